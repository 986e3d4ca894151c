"""The recipe's data section and the grammar of source addresses."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from data.config import DataConfig, SourceAddress, parse_source


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("stdlib", SourceAddress("stdlib")),
        ("digits", SourceAddress("digits")),
        ("text:a/*.txt", SourceAddress("text", "a/*.txt")),
        ("jsonl:a#b.jsonl#body", SourceAddress("jsonl", "a#b.jsonl", "body")),
        ("parquet:/x/y.parquet#text", SourceAddress("parquet", "/x/y.parquet", "text")),
        ("images:photos", SourceAddress("images", "photos")),
        ("hf:user/name", SourceAddress("hf", "user/name")),
        ("hf:name:config@test#body", SourceAddress("hf", "name", "body", "config", "test")),
        ("hf:name@train[:10%]", SourceAddress("hf", "name", None, None, "train[:10%]")),
        ("hf:name#body", SourceAddress("hf", "name", "body")),
    ],
)
def test_each_form_of_address_is_parsed(address: str, parsed: SourceAddress) -> None:
    assert parse_source(address) == parsed


@pytest.mark.parametrize(
    "address",
    ["", "stdlb", "stdlib:x", "text:", "jsonl:x", "jsonl:#f", "parquet:x#", "hf:", "hf:a:@x", "hf:a#", "s3:x"],
)
def test_a_bad_address_is_refused_with_the_forms_in_one_line(address: str) -> None:
    with pytest.raises(ValueError, match=r"the forms are .*jsonl:PATH#FIELD") as refused:
        parse_source(address)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError, match="the forms are"):
        DataConfig(source=address)


@pytest.mark.parametrize(
    "values",
    [
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"sequence_tokens": 0},
        {"image_channels": 2},
        {"prefetch_steps": 0},
        {"tokenizer": "bpe:256"},
        {"tokenizer": "bpe:many"},
        {"tokenizer": ""},
        {"sequence_length": 4},
    ],
)
def test_impossible_values_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate(values)


def test_the_configuration_imports_no_array_library() -> None:
    program = (
        "import sys, data.config; "
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'datasets', 'tokenizers') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_preparation_does_not_import_torch() -> None:
    program = "import sys, data.prepare, data.dataset; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
