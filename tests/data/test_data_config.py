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
        ("hf:name#photo,class", SourceAddress("hf", "name", "photo", label_column="class")),
        ("csv:a/b#c.csv#file,kind", SourceAddress("csv", "a/b#c.csv", "file", label_column="kind")),
    ],
)
def test_each_form_of_address_is_parsed(address: str, parsed: SourceAddress) -> None:
    assert parse_source(address) == parsed


@pytest.mark.parametrize(
    "address",
    [
        "", "stdlb", "stdlib:x", "text:", "jsonl:x", "jsonl:#f", "parquet:x#", "hf:", "hf:a:@x", "hf:a#", "hf:a#b,", "s3:x",
        "csv:a.csv", "csv:a.csv#file", "csv:#a,b", "test=", "=stdlib", "a b=stdlib", "a:b=stdlib",
    ],
)  # fmt: skip
def test_a_bad_address_is_refused_with_the_forms_in_one_line(address: str) -> None:
    with pytest.raises(ValueError, match=r"the forms are .*jsonl:PATH#FIELD") as refused:
        parse_source(address)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValidationError, match="the forms are"):
        DataConfig(source=address)


def test_sources_and_the_splits_they_make() -> None:
    config = DataConfig(source=("train=text:a=b", "hf:name@test", "my-test=stdlib"))
    assert [(one.into, one.address.kind, one.address.location) for one in config.sources] == [
        ("train", "text", "a=b"),
        (None, "hf", "name"),
        ("my-test", "stdlib", ""),
    ]
    assert config.splits == ("my-test", "train", "validation")
    assert config.source_text == "train=text:a=b, hf:name@test, my-test=stdlib"
    assert DataConfig(source="text:a=b").sources[0].into is None
    assert DataConfig(source="test=stdlib").splits == ("test",)
    assert DataConfig.model_validate_json(config.model_dump_json(), strict=True) == config


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
        {"source": ()},
        {"source": ("stdlib", "digits")},
        {"source": "train=stdlib", "validation_fraction": 0.1},
        {"source": "csv:a.csv#b,c", "tokenizer": "bpe:300"},
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
