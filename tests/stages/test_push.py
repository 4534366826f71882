"""`edgerazor push`: what is sent to a stand-in of the hub, what never is, and a sentence for everything that fails."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from edgerazor.stages import push
from helpers import hub as hubs
from helpers.hub import TOKEN, Hub, Repository
from helpers.tiny_job import Run, call

REPO = "somebody/tiny"


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job with a packed folder."""
    job = tmp_path_factory.mktemp("jobs") / "job"
    assert call("pack", llama, "--bits", "4", "--plan", "interleave", "--work", job).code == 0
    return job


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """The packed folder, to be changed."""
    shutil.copytree(made / "packed", tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, with a token that it accepts."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with hubs.running() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        yield running


def local(folder: Path) -> dict[str, bytes]:
    """What is to be sent of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in push.RECORDS}


def test_every_file_arrives_and_no_record_does(hub: Hub, folder: Path, run: Run) -> None:
    (folder / ".hidden").write_text("x")
    done = run("push", folder, REPO, "--json")
    assert done.code == 0, done.err
    (folder / ".hidden").unlink()
    assert hub.repositories[REPO].branches["main"] == local(folder)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(local(folder))
    assert not {"manifest.json", "result.json"} & set(local(folder))
    assert not hub.repositories[REPO].private
    result = done.json()
    assert (result["private"], result["dry_run"]) == (False, False)
    assert result["url"].endswith(f"/{REPO}/commit/{'1' * 40}")
    assert result["bytes"] == sum(map(len, local(folder).values()))
    assert TOKEN not in done.out + done.err


def test_a_dry_run_lists_files_and_touches_no_network(hub: Hub, folder: Path, run: Run) -> None:
    done = run("push", folder, REPO, "--dry-run")
    assert done.code == 0
    assert hub.requests == []
    for name, content in local(folder).items():
        assert f"{name}: {len(content):,} bytes" in done.out
    assert "manifest.json" not in done.out
    assert f"would go to {REPO}" in done.out


def test_a_private_repository(hub: Hub, folder: Path, run: Run) -> None:
    assert run("push", folder, REPO, "--private").code == 0
    assert hub.repositories[REPO].private
    assert "private repository" in run("push", folder, REPO).out  # it stays so


def test_a_public_repository_is_not_taken_for_a_private_one(hub: Hub, folder: Path, run: Run) -> None:
    hub.repositories[REPO] = Repository(private=False)
    refused = run("push", folder, REPO, "--private")
    assert refused.code == 1
    assert f"{REPO} is a public repository already" in refused.err
    assert hub.repositories[REPO].branches["main"] == {}


def test_a_branch(hub: Hub, folder: Path, run: Run) -> None:
    for _ in range(2):
        assert run("push", folder, REPO, "--revision", "v2/a").code == 0
    assert hub.repositories[REPO].branches == {"main": {}, "v2/a": local(folder)}


def test_other_weights_are_not_mixed_with_ours(hub: Hub, folder: Path, run: Run) -> None:
    hub.repositories[REPO] = Repository(private=False, branches={"main": {"model-00001-of-00002.safetensors": b""}})
    refused = run("push", folder, REPO)
    assert refused.code == 1
    assert "holds other weight files, such as model-00001-of-00002.safetensors" in refused.err
    assert hub.count("/commit/") == 0


@pytest.mark.parametrize("part", ["/commit/", "/large/"])
def test_a_push_that_failed_goes_on(hub: Hub, folder: Path, run: Run, part: str) -> None:
    """What arrived before is not sent again."""
    method = "PUT" if part == "/large/" else "POST"
    hub.failures[method, part] = (1, 400, f"something odd with {TOKEN}")
    failed = run("push", folder, REPO)
    assert failed.code == 1
    assert TOKEN not in failed.out + failed.err
    assert "Traceback" not in failed.err
    assert hub.repositories[REPO].branches["main"] == {}
    assert run("push", folder, REPO).code == 0
    assert hub.repositories[REPO].branches["main"] == local(folder)
    assert hub.count("PUT /large/") == (1 if part == "/commit/" else 2)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "does not accept the token"),
        (403, f"does not let you write to {REPO}: no rights"),
        (404, f"There is no {REPO} on the hub that you may write to"),
        (400, f"refused {REPO} (400): no rights"),
        (500, "could not take it now (500)"),
    ],
)
def test_refusals_are_one_sentence(hub: Hub, folder: Path, run: Run, status: int, sentence: str) -> None:
    part = "/api/repos/create" if status == 500 else "/preupload/"  # where nothing is tried again for half a minute
    hub.failures["POST", part] = (9, status, "no rights")
    refused = run("push", folder, REPO)
    assert refused.code == 1
    assert sentence in refused.err
    assert refused.err.count("Error: ") == 1
    assert TOKEN not in refused.out + refused.err


def test_a_token_that_is_wrong(hub: Hub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotherone")
    refused = run("push", folder, REPO)
    assert (refused.code, hub.repositories) == (1, {})
    assert "does not accept the token" in refused.err
    assert "hf_anotherone" not in refused.out + refused.err


def test_no_token(hub: Hub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused = run("push", folder, REPO)
    assert refused.code == 1
    assert "There is no token of the Hugging Face hub." in refused.err
    assert "hf auth login" in refused.err
    assert hub.requests == []


def test_no_network(hub: Hub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    refused = run("push", folder, REPO)
    assert refused.code == 1
    assert "could not be reached" in refused.err


def test_a_damaged_folder_is_not_sent(hub: Hub, folder: Path, run: Run) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-40] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    for words in ((), ("--dry-run",)):
        refused = run("push", folder, REPO, *words)
        assert refused.code == 1
    assert hub.requests == []


def test_what_is_no_packed_folder(hub: Hub, made: Path, llama: Path, run: Run, tmp_path: Path) -> None:
    for path, hint in ((llama, "edgerazor pack"), (tmp_path / "none", "edgerazor pack"), (made, str(made / "packed"))):
        refused = run("push", path, REPO)
        assert refused.code == 2
        assert "is not a packed model" in refused.err
        assert hint in refused.err
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["tiny", "a/b/c", "a b/c", "../x", "-a/b", "https://huggingface.co/a/b", "a/b.git"])
def test_names_that_no_repository_has(hub: Hub, folder: Path, run: Run, repo: str) -> None:
    refused = run("push", folder, "--", repo)
    assert refused.code == 2
    assert "is no name of a repository" in refused.err
    assert hub.requests == []


def test_a_link_that_leaves_the_folder_is_not_followed(hub: Hub, folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "NOTICE").symlink_to(tmp_path / "secret")
    refused = run("push", folder, REPO)
    assert refused.code == 1
    assert "a link that leaves" in refused.err
    assert hub.requests == []


def test_a_folder_without_a_card_is_sent_with_a_warning(hub: Hub, folder: Path, run: Run) -> None:
    (folder / "README.md").unlink()
    done = run("push", folder, REPO)
    assert done.code == 0
    assert "has no card (README.md)" in done.err


def test_the_card_that_is_sent_has_metadata_of_the_hub(hub: Hub, folder: Path, run: Run) -> None:
    assert run("push", folder, REPO).code == 0
    card = huggingface_hub.ModelCard(hub.repositories[REPO].branches["main"]["README.md"].decode())
    data = json.loads(json.dumps(card.data.to_dict()))
    assert (data["library_name"], data["pipeline_tag"]) == ("edgerazor", "text-generation")
