"""Manifests: what is accepted, what is refused and how, and the round trip through JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modularbase.errors import PackFormatError
from modularbase.packs.manifest import Manifest, PackRequirement, manifest_schema, parse_manifest

LEAST: dict[str, Any] = {
    "id": "python_code",
    "version": "1.0.0",
    "name": "Python",
    "domain": "python",
    "licence": "Apache-2.0",
    "base_id": "smollm2-135m",
}


def manifest(**changes: Any) -> Manifest:
    return parse_manifest(json.dumps(LEAST | changes), "pack.json")


def test_the_least_manifest_and_its_round_trip() -> None:
    found = manifest()
    assert parse_manifest(found.to_json(), "again.json") == found
    assert found.suits_base("1.0.0")
    assert found.quantisation.experts == "q4_0"


def test_everything_survives_the_round_trip() -> None:
    found = manifest(
        id="医疗问答包",
        name="医疗问答包",
        version="2.1.0rc1",
        languages=["zh", "en"],
        base_compatibility=["1.0", ">=1.1,<2"],
        base_digest="sha256:" + "a" * 64,
        dependencies=[{"id": "reasoning", "version": ">=1.1"}],
        conflicts=[{"id": "other", "version": "<1"}],
        fallback=["reasoning", "general_chat"],
        priority=3,
        quantisation={"adapters": "bf16", "experts": "q8_0", "kl": 0.001},
        training={"command": "modularbase train fit", "seed": 1, "n_tokens": 5},
        evaluation={"perplexity": 12.5},
    )
    again = parse_manifest(found.to_json(), "again.json")
    assert again == found
    assert "医疗问答包" in found.to_json()
    assert [found.suits_base(v) for v in ("1.0", "1.1.5", "1.0.1", "2.0")] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": "../up"}, "id"),
        ({"id": ".hidden"}, "id"),
        ({"id": "a/b"}, "id"),
        ({"id": ""}, "id"),
        ({"id": "x" * 65}, "id"),
        ({"id": "dot."}, "id"),
        ({"id": 5}, "id"),
        ({"version": "1"}, "version"),
        ({"version": "latest"}, "version"),
        ({"name": ""}, "name"),
        ({"name": "two\nlines"}, "name"),
        ({"base_digest": "sha256:12"}, "base_digest"),
        ({"base_compatibility": ["about 1"]}, "base_compatibility.0"),
        ({"dependencies": [{"id": "x", "version": "=>1"}]}, "dependencies.0.version"),
        ({"dependencies": [{"id": "x", "extra": 1}]}, "dependencies.0.extra"),
        ({"dependencies": [{"id": "python_code"}]}, "manifest"),
        ({"conflicts": [{"id": "x"}, {"id": "x"}]}, "manifest"),
        ({"fallback": ["python_code"]}, "manifest"),
        ({"priority": 10_000}, "priority"),
        ({"size_bytes": -1}, "size_bytes"),
        ({"quantisation": {"experts": "q3"}}, "quantisation.experts"),
        ({"manifest_version": 2}, "manifest_version"),
        ({"surprise": True}, "surprise"),
    ],
)
def test_what_is_refused_names_the_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(PackFormatError) as caught:
        manifest(**changes)
    assert caught.value.field == field
    assert caught.value.file == "pack.json"
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("field", sorted(LEAST))
def test_a_missing_field_is_named(field: str) -> None:
    text = json.dumps({key: value for key, value in LEAST.items() if key != field})
    with pytest.raises(PackFormatError, match="found nothing") as caught:
        parse_manifest(text, "pack.json")
    assert caught.value.field == field


@given(st.binary(max_size=200))
def test_any_bytes_give_a_manifest_or_a_named_error(raw: bytes) -> None:
    with pytest.raises(PackFormatError):
        parse_manifest(raw, "pack.json")


def test_ids_are_compared_in_one_normal_form() -> None:
    assert manifest(id="cafe\u0301").id == manifest(id="caf\u00e9").id


@pytest.mark.parametrize(
    ("specifier", "version", "accepted"),
    [
        ("*", "0.0.1", True),
        ("1.1.0", "1.1.0", True),
        ("1.1.0", "1.1.1", False),
        (">=1.1", "1.2.0rc1", True),
        (">=1.1,<2", "2.0.0", False),
        ("~=1.4.2", "1.4.9", True),
    ],
)
def test_specifiers(specifier: str, version: str, accepted: bool) -> None:
    assert PackRequirement(id="x", version=specifier).accepts(version) is accepted


def test_the_published_schema_is_the_one_in_force() -> None:
    assert set(manifest_schema()["properties"]) == set(Manifest.model_fields)
    published = Path(__file__).resolve().parents[3] / "docs" / "pack-manifest.schema.json"
    assert json.loads(published.read_text(encoding="utf-8")) == manifest_schema()
