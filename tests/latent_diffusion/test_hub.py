import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from latent_diffusion import hub
from latent_diffusion.errors import InputError
from latent_diffusion.hub import existing_file, local_folder, read_json

REPOSITORY = Path(__file__).parents[2]
FILES = ("config.json", "absent.json", ("absent.pdparams", "weights.bin", "more.bin"))


def test_a_folder_is_returned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_download", pytest.fail)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path), "a/b", "./a/", "a"):
        assert local_folder(name, FILES, "VAE") == Path(name)


@pytest.mark.parametrize(
    "name",
    ["vae", "./some/vae", "../some/vae", "/some/vae", "~/some/vae", "some\\vae", "some/../vae", "some//vae"]
    + ["some/the vae", "a/b/c/d/e", "https://host/some/vae"],
)
def test_what_cannot_be_a_name_on_the_hub_is_a_missing_folder_at_once(monkeypatch, name):
    monkeypatch.setattr(hub, "_download", pytest.fail)
    with pytest.raises(InputError, match="the VAE folder .* does not exist"):
        local_folder(name, FILES, "VAE")


@pytest.fixture
def server(tmp_path):
    """A hub with one folder: its address and the requests that it got."""
    folder = tmp_path / "hub/models/community/some/model/vae"
    folder.mkdir(parents=True)
    for name in ("config.json", "weights.bin", "more.bin"):
        (folder / name).write_text(name)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *arguments):
            requests.append(self.requestline.split()[:2])

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "hub"))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", requests
    served.shutdown()
    served.server_close()


# The libraries read the address of the hub and of the cache when they are imported.
ASK = """
import json, sys
from latent_diffusion.errors import InputError
from latent_diffusion.hub import local_folder
for name in sys.argv[2:]:
    try:
        print(local_folder(name, json.loads(sys.argv[1]), "VAE"))
    except InputError as error:
        print("error:", error)
"""


def ask(endpoint: str, cache: Path, *names: str) -> subprocess.CompletedProcess:
    direct = {"PPNLP_ENDPOINT": endpoint, "PPNLP_HOME": str(cache), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(FILES), *names],
        cwd=REPOSITORY,
        env=os.environ | direct,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_what_the_hub_has_of_a_folder_is_downloaded_once(server, tmp_path):
    endpoint, requests = server
    cache = tmp_path / "cache"
    cache.mkdir()
    first = ask(endpoint, cache, "some/model/vae", "some/other")
    folder, missing = first.stdout.splitlines()[-2:]
    assert Path(folder).is_relative_to(cache)
    assert {path.name: path.read_text() for path in Path(folder).iterdir()} == {
        "config.json": "config.json",
        "weights.bin": "weights.bin",  # and not the second of the alternatives
    }
    assert missing.startswith("error: the VAE 'some/other' is neither a folder nor could it be downloaded")
    assert "the hub has no such files" in missing
    assert "the hub was not reached" not in first.stderr
    assert sum(method == "GET" for method, _ in requests) == 2

    unreachable = ask("http://127.0.0.1:9", cache, "some/model/vae/", "some/other")
    again, missing = unreachable.stdout.splitlines()[-2:]
    assert again == folder
    assert "could it be downloaded (ConnectionError); give the path of a downloaded VAE folder" in missing
    assert (
        "warning: the hub was not reached (ConnectionError); the VAE some/model/vae is taken from" in unreachable.stderr
    )


def test_a_folder_without_its_last_file_is_not_taken(monkeypatch, tmp_path):
    asked = []

    def download(name, file):
        asked.append(file)
        return tmp_path / file if file == "config.json" else None

    monkeypatch.setattr(hub, "_download", download)
    with pytest.raises(InputError, match="the VAE 'some/vae' is neither a folder nor could it be downloaded"):
        local_folder("some/vae", FILES, "VAE")
    assert asked == ["config.json", "absent.json", "absent.pdparams", "weights.bin", "more.bin"]


def test_the_first_file_that_exists_is_found(tmp_path):
    (tmp_path / "b").touch()
    (tmp_path / "a").mkdir()
    assert existing_file(tmp_path, ("a", "b", "c"), "VAE") == tmp_path / "b"
    with pytest.raises(InputError, match=r"the VAE folder .* holds no a or c"):
        existing_file(tmp_path, ("a", "c"), "VAE")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[" * 100000, "is not JSON"), (b"[]", "holds no JSON object")],
)
def test_a_file_without_a_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json {message}"):
        read_json(path)


def test_a_json_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"missing\.json cannot be read: No such file"):
        read_json(tmp_path / "missing.json")
