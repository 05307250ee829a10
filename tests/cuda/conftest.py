"""The models of the CPU's tests."""

from tests.python.conftest import chat_model, pack_model, wide_model

__all__ = ["chat_model", "pack_model", "wide_model"]
