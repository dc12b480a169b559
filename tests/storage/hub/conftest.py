"""The client, turned to a Hub of our own, with an empty cache and no token of anybody's."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http

from tests.support import hub_server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[hub_server.Hub]:
    with hub_server.serving() as served:
        turned_to(monkeypatch, served.url, tmp_path / "cache")
        yield served
        huggingface_hub.close_session()


def turned_to(monkeypatch: pytest.MonkeyPatch, url: str, cache) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)  # the client's own instance, which PEFT asks
    if "transformers.utils.hub" in sys.modules:  # which keeps one of its own
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None, raising=False)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between its attempts
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
