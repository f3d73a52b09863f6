"""A strict stand-in for the Hugging Face Hub, for tests of what downloads from it and uploads to it.

    hub = Hub()
    hub.add("org/model", {"config.json": b"{}"})
    hub.faults.append(Fault("GET", "/stored/", send_bytes=1000))
    with serving(hub):
        run_command("quantize", "fetch", "org/model", hub=hub, home=tmp_path)
    assert hub.asked_for("GET") == {"config.json"}

Read in this order: `data` (what it holds), `server` (what it is asked), `reading` and `writing` (what it answers),
`card` (what it says of a model card), `client` (programs run against it).

Sources: huggingface_hub 2.4 for each request and for what is read of the answer (`hf_api.py`, `_commit_api.py`,
`lfs.py`, `file_download.py`, and `hf_raise_for_status` in `utils/_http.py` for the error codes);
https://huggingface.co/docs/hub/api; https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md. The words of errors
are the Hub's where a public report quotes them. Not spoken: Xet, pull requests,
branches besides main, deletions, datasets and spaces, git itself.
"""

from hub.client import finish, only_error, run_command, run_python, start_command, start_python
from hub.data import ALWAYS, READER, WRITER, Commit, Fault, Hub, Repo, Request, flip_bit
from hub.server import serving

__all__ = [
    "ALWAYS",
    "READER",
    "WRITER",
    "Commit",
    "Fault",
    "Hub",
    "Repo",
    "Request",
    "finish",
    "flip_bit",
    "only_error",
    "run_command",
    "run_python",
    "serving",
    "start_command",
    "start_python",
]
