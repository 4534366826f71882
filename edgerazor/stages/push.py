"""A packed folder to the Hugging Face hub, once every byte of it is verified.

Only what belongs to the model is sent: records of the job (`manifest.json`, `result.json`), which name this machine and
its folders, stay here. A push that failed on the way is run again: files that are there already are not sent twice.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, Field
from rich.console import RenderableType

from edgerazor import transformers_plugin
from edgerazor.console import Console, megabytes
from edgerazor.errors import UserError, plain, usage_error
from edgerazor.packed import PackedModel
from edgerazor.untrusted import links
from edgerazor.workdir import CARD, WorkDir, find_folder

#: Records of a job, which are not sent.
RECORDS = ("manifest.json", "result.json")
#: Weight files, of which a repository must hold those of one model alone.
WEIGHTS = ".safetensors"
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."


class PushResult(BaseModel):
    """What was sent, or would be."""

    folder: str
    repo: str
    revision: str | None = Field(description="the branch; null for the main one")
    private: bool | None = Field(description="whether the repository is; null where the hub was not asked")
    dry_run: bool
    files: dict[str, int] = Field(description="name -> bytes")
    bytes: int
    url: str | None = Field(description="of the commit")


def run(folder: Path, repo: str, private: bool, revision: str | None, dry_run: bool, console: Console) -> PushResult:
    """Verify a packed folder and send it.

    Args:
        folder: that `pack` wrote.
        repo: of the hub, `NAME/MODEL`; it is made if it is not there.
        private: make it a private one; one that is public already is refused.
        revision: the branch, which is made if it is not there; None for the main one.
        dry_run: say what would be sent; the network is not touched.
        console: where progress is shown.

    Raises:
        UserError: it is no packed folder or damaged; there is no token, no network, or the hub refuses.
    """
    folder = packed_folder(folder)
    check_name(repo)
    files = files_of(folder)
    model = PackedModel.open(folder)
    with console.track("verify", len(model.header.matrices)) as tracker:
        model.verify(tracker.advance)
        model.input_scales()
    if CARD not in files:
        console.warn(f"{folder} has no card ({CARD}), so nobody will know what it is; `edgerazor pack` writes one.")
    result = PushResult(
        folder=str(folder),
        repo=repo,
        revision=revision,
        private=True if private else None,
        dry_run=dry_run,
        files=files,
        bytes=sum(files.values()),
        url=None,
    )
    return result if dry_run else send(folder, result, private, console)


def show(result: PushResult) -> list[RenderableType]:
    """What was sent, for people: each file of a dry run, a line else."""
    where = f"{result.repo}{f' ({result.revision})' if result.revision else ''}"
    if result.dry_run:
        lines = [f"{name}: {size:,} bytes" for name, size in result.files.items()]
        return [*lines, f"would go to {where}: {len(result.files)} files, {megabytes(result.bytes)}, all verified"]
    kind = "private" if result.private else "public"
    return [f"{result.folder} is in the {kind} repository {where}: {result.url}"]


# --- what is sent ------------------------------------------------------------------------------


def packed_folder(folder: Path) -> Path:
    """The packed folder that is meant.

    Raises:
        UserError: it is none.
    """
    find_folder(folder)
    if transformers_plugin.is_packed(folder):
        return folder
    inside = WorkDir(folder).folder("pack")
    hint = "Make one with `edgerazor pack`."
    if transformers_plugin.is_packed(inside):
        hint = f"Name the one in it: `edgerazor push {inside} REPO`."
    raise usage_error(f"{folder} is not a packed model.", hint)


def files_of(folder: Path) -> dict[str, int]:
    """Name -> bytes of the files that are sent: those of the model, none hidden, none of a job's records.

    Raises:
        UserError: one of them is a link that leaves the folder.
    """
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in RECORDS]
    files = [file for file in files if not file.name.startswith(".")]
    links.refuse_leaving(folder, files)
    return {file.name: file.stat().st_size for file in files}


def check_name(repo: str) -> None:
    """Refuse what can be no repository.

    Raises:
        UserError: it has no name of a user or an organisation, or characters that no repository has.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        valid = False
    else:
        valid = repo.count("/") == 1
    if not valid:
        raise usage_error(
            f"{plain(repo, 100)} is no name of a repository.", "Give NAME/MODEL: your name on the hub, and the model's."
        )


# --- the hub -----------------------------------------------------------------------------------


def send(folder: Path, result: PushResult, private: bool, console: Console) -> PushResult:
    """Make the repository and its branch where they are not there, and upload the files in one commit.

    Raises:
        UserError: there is no token, no network, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    api, repo, revision = HfApi(), result.repo, result.revision
    disabled = are_progress_bars_disabled()
    if console.quiet or not console.err.is_terminal:
        disable_progress_bars()
    try:
        with explained(repo):
            require_token()
            api.create_repo(repo, private=True if private else None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            information = api.model_info(repo, revision=revision)
            if private and not information.private:
                raise UserError(
                    f"{repo} is a public repository already, so nothing was sent.",
                    "Make it private in its settings on the hub, or give another name.",
                )
            refuse_other_weights(repo, {file.rfilename for file in information.siblings or ()}, result.files)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message="Packed by edgerazor",
                allow_patterns=[glob.escape(name) for name in result.files],
            )
    finally:
        if not disabled:
            enable_progress_bars()
    return result.model_copy(update={"private": bool(information.private), "url": str(commit.commit_url)})


def require_token() -> None:
    """Refuse to begin without a token.

    Raises:
        UserError: there is none.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("There is no token of the Hugging Face hub.", LOG_IN)


def refuse_other_weights(repo: str, there: set[str], ours: dict[str, int]) -> None:
    """Refuse a repository that holds weight files which would stay beside ours: nobody could load that.

    Raises:
        UserError: it names one of them.
    """
    others = sorted(name for name in there if name.endswith(WEIGHTS) and "/" not in name and name not in ours)
    if others:
        raise UserError(
            f"{repo} holds other weight files, such as {plain(others[0], 80)}, which would stay beside these; nothing "
            "was sent.",
            "Give a repository of its own, or delete them there first.",
        )


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Failures of the hub and of the network as one sentence each; none of them quotes a header or the token.

    Raises:
        UserError: there was one.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        chain = list(causes(error))
        refusal = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
        if refusal is not None:
            raise refused(repo, refusal.response.status_code, refusal.server_message) from None
        if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
            raise UserError(
                "The Hugging Face hub is switched off (HF_HUB_OFFLINE).", "Unset it and try again."
            ) from None
        if any(isinstance(cause, HTTPError | ConnectionError | TimeoutError) for cause in chain):
            raise UserError(
                "The Hugging Face hub could not be reached, or fell silent.",
                "Connect to the network and run the same command again: what is there already is not sent twice.",
            ) from None
        if isinstance(error, OSError):  # of the disk
            raise
        raise UserError(
            f"The upload to {repo} failed: {without_token(str(error))}",
            "Run the same command again: what is there already is not sent twice.",
        ) from None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of, innermost last."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def refused(repo: str, status: int, message: str | None) -> UserError:
    """A sentence for an answer of the hub that is no success."""
    said = f": {without_token(message).rstrip('.')}" if message else ""
    if status == 401:
        return UserError("The Hugging Face hub does not accept the token.", LOG_IN)
    if status == 403:
        return UserError(f"The hub does not let you write to {repo}{said}.", LOG_IN)
    if status == 404:
        return UserError(f"There is no {repo} on the hub that you may write to.", f"Check the name. {LOG_IN}")
    if status == 429 or status >= 500:
        return UserError(
            f"The hub could not take it now ({status}){said}.",
            "Run the same command again later: what is there already is not sent twice.",
        )
    return UserError(f"The hub refused {repo} ({status}){said}.", "Mend what it names, and run the same command again.")


def without_token(text: str) -> str:
    """A stranger's text as part of a sentence, in no case with the token."""
    from huggingface_hub import get_token

    token = get_token()
    return plain(text.replace(token, "***") if token else text, 300)
