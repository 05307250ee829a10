"""The error tree: fields, messages, and that errors survive a process boundary."""

from __future__ import annotations

import pickle

import pytest

from modularbase import errors

EXAMPLES: list[errors.ModularBaseError] = [
    errors.BaseLoadError(file="a.gguf", field="version", expected="3", found="9"),
    errors.InvalidRequestError(field="temperature", expected=">= 0", found="-1"),
    errors.ContextLengthError(n_tokens=9, n_ctx=8),
    errors.KvCacheFullError(needed_bytes=9, limit_bytes=8),
    errors.CancelledError(),
    errors.DeviceError("no such device"),
    errors.BaseNotFoundError(name="x", known=["a", "b"]),
    errors.InstallError("no route", kind="network", name="b", source="s", path="p"),
    errors.ChatTemplateError("loops", line=3),
    errors.TokenizerError(field="pre", expected="known", found="x"),
    errors.PackFormatError(file="a.pack", field="d_ff", expected="256", found="9"),
    errors.DependencyError("a needs b"),
    errors.PackNotFoundError(pack_id="code", required=">=2", known=["code 1.0.0"]),
    errors.PackIncompatibleError(pack_id="code", field="base_id", required="a", found="b"),
    errors.BudgetExceededError(pack_id="code", needed_bytes=9, budget_bytes=8, reason="full"),
    errors.HistoryError(file="a.sqlite", field="user_version", expected="at most 1", found="2"),
    errors.TrainingError("the loss is not finite"),
    errors.ChannelError(segment="/s", field="magic", expected="MBWEIGHT", found="nothing"),
    errors.TeacherError("http://a/v1", "it answered 401", status=401),
    errors.ContextBudgetError(9, 8, {"rules": 6, "window": 3}),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_pickling_keeps_message_and_fields(error: errors.ModularBaseError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) and vars(copy) == vars(error)


def test_messages_name_what_is_wrong() -> None:
    assert str(EXAMPLES[0]) == "a.gguf: version: expected 3, found 9"
    assert str(EXAMPLES[1]) == "temperature: expected >= 0, found -1"
    assert "9" in str(EXAMPLES[2]) and "8" in str(EXAMPLES[2])
    assert str(EXAMPLES[6]).startswith("no base is named 'x'; known bases: a, b")
    assert str(EXAMPLES[7]) == "b: no route [from s] [at p]"
    assert str(EXAMPLES[8]) == "chat template (line 3): loops"
    assert str(EXAMPLES[12]) == "no pack code >=2; known packs: code 1.0.0"
    assert str(EXAMPLES[13]) == "pack code: base_id: required a, found b"
    assert str(EXAMPLES[14]) == "pack code needs 9 bytes, the budget is 8: full"
    assert str(EXAMPLES[16]) == "the loss is not finite"
    assert str(EXAMPLES[17]) == "segment /s: magic: expected MBWEIGHT, found nothing"
    assert str(EXAMPLES[18]) == "teacher http://a/v1: it answered 401"
    assert str(EXAMPLES[19]) == (
        "the context needs 9 bytes at least (rules 6, window 3), the budget is 8"
    )


def test_every_error_is_covered() -> None:
    names = {type(error).__name__ for error in EXAMPLES}
    assert names | {"ModularBaseError", "FileError", "InstallFailure"} == set(errors.__all__)
    assert isinstance(EXAMPLES[0], errors.FileError)
    assert isinstance(EXAMPLES[1], ValueError)
