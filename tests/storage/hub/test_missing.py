"""What is not on the Hub, where the answer is a bare 404: a proxy, a mirror, another address."""

from __future__ import annotations

import pytest

import jaxadapt
from tests.support import small

REPO = "org/missing"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (
            f"hf://{REPO}",
            r"there is no repository 'org/missing', or no file 'adapter_config\.json' in it: .* answered 404",
        ),
        (f"hf://{REPO}@v1/fr", r"'org/missing', no revision 'v1' of it, or no file 'fr/adapter_config\.json' in it"),
    ],
)
def test_a_bare_404_names_what_was_asked_for(hub, monkeypatch, address, says):
    hub.answers["resolve"] = 404
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(jaxadapt.FileError, match=says + r".*\(told to\); check the name$"):
        jaxadapt.load(address, small.net())
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(jaxadapt.FileError, match="check the name, and HF_ENDPOINT$"):
        jaxadapt.pull(address)
