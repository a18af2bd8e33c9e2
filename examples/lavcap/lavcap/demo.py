"""The page of ``lavcap demo``: a video is dropped, its caption comes beside the picture of its alignment.

Gradio serves it, with its telemetry switched off; neither it nor the page asks anything of a network.
"""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lavcap.alignment import describe_plan, draw, one_line
from lavcap.caption import FileCaptioner, Result
from lavcap.config import Config
from lavcap.data.decode import SECONDS

TITLE = "lavcap"
KEPT = 3600  # seconds that an uploaded file stays on the disk


def load_gradio() -> Any:
    """The module, told to report to no one.

    Raises:
        ValueError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # looked at on import, and by each of its components
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}): pip install 'lavcap[demo]'") from error
    return gradio


def build_page(captioner: FileCaptioner, name: str) -> Any:
    """The ``gradio.Blocks`` of a captioner that is called ``name`` on it."""
    gr = load_gradio()

    def caption(video: str | None) -> tuple[str, np.ndarray | None, str]:
        if video is None:
            return "", None, ""
        (result,) = captioner.caption([Path(video)])
        return answer(result, captioner.checkpoint.config)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(
            f"# What is heard here?\nCaptioner: `{one_line(name)}`. It listens and looks for {SECONDS} seconds."
        )
        with gr.Row():
            with gr.Column(scale=2):
                video = gr.File(label="Drop a video", type="filepath", elem_id="video")
                text = gr.Textbox(label="Caption", interactive=False, lines=2, elem_id="caption")
                notes = gr.HTML(elem_id="notes")
            with gr.Column(scale=5):
                picture = gr.Image(
                    label="Which sound goes with which picture",
                    show_label=False,  # it would cover the title
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],  # the third would send it to a public server
                    elem_id="picture",
                )
        video.change(caption, video, [text, picture, notes], api_visibility="private")
    return page


def serve(page: Any, host: str, port: int | None) -> int:
    """Until it is interrupted.

    Raises:
        ValueError: an address that is not this machine's, or a port that is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            share=False,
            ssr_mode=False,
            quiet=True,
            footer_links=[],
        )
    except OSError as error:
        raise ValueError(f"--host {host} cannot be served at: {error}") from error
    print(f"lavcap demo: {address} (Ctrl+C ends it)", flush=True)
    page.block_thread()
    return 0


def answer(result: Result, config: Config) -> tuple[str, np.ndarray | None, str]:
    """Caption, picture and remarks (HTML) of a file that was dropped."""
    name = one_line(result.path.name)
    if result.error is not None:
        return "", None, f'<p role="alert"><strong>{escape(name)}</strong> {escape(result.error)}.</p>'
    assert result.alignment is not None
    plan = describe_plan(config, result.plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "alignment.png"
        draw(path, result.alignment, title=result.caption or "(an empty caption)", lines=[f"{name} · {plan}"])
        picture = np.asarray(Image.open(path).convert("RGB"))
    remarks = [f"{result.seconds:.1f} s of {name}.", *(f"{note}." for note in result.notes), f"{plan}."]
    return one_line(result.caption or ""), picture, "".join(f"<p>{escape(remark)}</p>" for remark in remarks)
