"""The page of the demo, and the same functions over HTTP. The only file that needs gradio (`pip install "deris-llm[demo]"`).

A question runs the networks once and leaves an `Asked` in the user's session; all that is shown afterwards is computed from it.
Gradio's own checks of what a client sends end in tracebacks in the log, so values reach the functions here as they came,
and these say what is wrong.

Every file of a user is in `DemoPage.folder`: uploads where gradio puts them, what the page shows in a folder per session.
"""

from __future__ import annotations

import functools
import html
import inspect as python_inspect
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: no request leaves this machine

import gradio as gr  # pyright: ignore[reportMissingImports]  # of the extra `demo`
from gradio import queueing, themes  # pyright: ignore[reportMissingImports]

from deris_llm.common.words import count_of, shortened
from deris_llm.serving.demo import files, views
from deris_llm.serving.demo.examples import Example
from deris_llm.serving.demo.requests import lines_of, phrase_index, rule_of, upload
from deris_llm.serving.demo.service import DemoService, RequestError
from deris_llm.serving.demo.sessions import Asked, Session, Sessions
from deris_llm.serving.demo.video import answer_video, told
from deris_llm.serving.inspection import Inspection

logger = logging.getLogger(__name__)

_PROGRESS = gr.Progress()  # a handler that has it as a default is given its own
_SESSION_SECONDS = 3600  # that an answer stays available
_CLEAN_SECONDS = (60, 3600)  # how often files are looked at, and the age of those that are removed
_NO_ANSWER = "There is no answer yet, or it was freed; choose an image, write some phrases and press Find."
_SELECTIONS = {
    "threshold_or_best": "above the threshold, else the best",
    "threshold": "above the threshold",
    "best": "the best alone",
}
_PRESENCE = {"none": "not used", "multiply": "multiplied with the scores", "gate": "below 0.5: nothing"}


class DemoPage:
    """The page. `launch` serves it.

    Attributes:
        blocks: gradio's page.
        service: the models.
        folder: everything that lies on disk.
        example_files: the images of the examples.
    """

    def __init__(
        self,
        service: DemoService,
        *,
        names: Sequence[str],
        checkpoint: str,
        examples: Sequence[Example] = (),
        note: str = "",
        folder: Path | None = None,
    ) -> None:
        """Builds the page.

        Args:
            service: the models.
            names: of each model, for the page.
            checkpoint: as it was given, for the command that reproduces an answer.
            examples: images with phrases.
            note: a sentence below the title.
            folder: for files of sessions; None = a new temporary one. It is emptied by `close`.
        """
        self.folder = (folder or Path(tempfile.mkdtemp(prefix="deris-demo-"))).resolve()
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)  # read when the components are made
        self.service, self._names, self._checkpoint, self._note = service, list(names), checkpoint, note
        self._sessions = Sessions(self.folder)
        self._example_folder = self.folder / "examples"
        self._examples = self._own_copies(examples)
        self.example_files = [Path(path) for path, _ in self._examples]
        self.blocks = self._built()

    def launch(self, **options: Any) -> tuple[Any, str, str]:
        """Serves the page; options as of `gradio.Blocks.launch`."""
        font = ["system-ui", "sans-serif"]  # no file from another host
        return self.blocks.queue(
            default_concurrency_limit=16, max_size=4 * self.service.limits.max_waiting
        ).launch(
            theme=themes.Default(font=font, font_mono=["ui-monospace", "monospace"]),
            head=f"<style>{Path(__file__).with_name('demo.css').read_text(encoding='utf-8')}</style>",  # gradio rewrites `css`
            max_file_size=f"{self.service.limits.max_file_mb}mb",
            footer_links=["api"],
            run_history=False,  # it would keep users' images in their browsers
            enable_monitoring=False,
            show_error=True,  # what gradio itself refuses; errors of ours are messages
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            **options,
        )

    def close(self) -> None:
        """Ends the server and removes the files of all sessions."""
        self.blocks.close(verbose=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _own_copies(self, examples: Sequence[Example]) -> list[Example]:
        """Copies example images to a folder that is served as it is, so that nothing beside them can be read."""
        copies = []
        for number, (path, phrases) in enumerate(examples):
            copy = self._example_folder / str(number) / Path(path).name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copies.append((str(copy), phrases))
        if copies:
            gr.set_static_paths([self._example_folder])
        return copies

    # -- what the page does ------------------------------------------------------------------------------------------

    def ask(self, session: Session | None, picture: Any, phrases: Any, request: gr.Request) -> tuple[Any, ...]:
        """Runs the networks about an image and its phrases, one a line."""
        session = self._sessions.get(str(request.session_hash))
        path, texts = self._path_of(picture), lines_of(phrases)
        if self._is_upload(path):
            session.uploads.add(path)
        source = path
        if session.asked is not None and session.asked.path == path and not path.exists():
            source = session.asked.inspections[0].image  # its file was removed after a while
        started = time.monotonic()
        waiting = self.service.submit(source, texts)
        session.waiting = waiting
        try:
            inspections = self.service.wait(waiting)
        finally:
            session.waiting = None
        session.asked = Asked(inspections, path, time.monotonic() - started)
        first = inspections[0]
        choices = [(f"{number}. {text}", number - 1) for number, text in enumerate(first.phrases, start=1)]
        return (
            session,
            gr.Dropdown(choices=choices, value=0),
            0,
        )

    def show_answers(
        self, session: Session | None, threshold: Any, selection: Any, presence: Any, chosen: Any
    ) -> tuple[str, str]:
        """Draws all answers by a rule, with a legend."""
        session, asked, inspection = _of(session)
        answers = rule_of(threshold, selection, presence).answers(inspection)
        phrase = phrase_index(chosen, inspection)
        image = session.write_image("answers", views.annotated_image(inspection, answers, phrase))
        return image, views.legend(answers, phrase) + _about(asked)

    def show_rounds(self, session: Session | None, chosen: Any, round_index: Any) -> tuple[tuple[str, str], str]:
        """Draws a phrase's best mask in a round and in the next one, and the scores by round."""
        session, _, inspection = _of(session)
        phrase = phrase_index(chosen, inspection)
        if not isinstance(round_index, (int, float)) or not 0 <= round_index <= inspection.num_rounds - 2:
            raise RequestError(
                f"The round: expected a whole number from 0 to {inspection.num_rounds - 2}, got {shortened(round_index)}; it is "
                "compared with the next one."
            )
        before, after = views.round_pair(inspection, phrase, int(round_index))
        pair = (session.write_image("round", before), session.write_image("next-round", after))
        return pair, views.score_chart(inspection, phrase)

    def show_queries(
        self, session: Session | None, threshold: Any, selection: Any, presence: Any, chosen: Any
    ) -> list[tuple[str, str]]:
        """Draws the masks of all queries of a phrase in the last round, best first."""
        session, _, inspection = _of(session)
        phrase = phrase_index(chosen, inspection)
        answer = rule_of(threshold, selection, presence).answers(inspection)[phrase]
        drawn = views.query_images(inspection, answer, phrase)
        return [(session.write_image("query", image), caption) for image, caption in drawn]

    def show_comparison(
        self, session: Session | None, threshold: Any, selection: Any, presence: Any, chosen: Any
    ) -> tuple[str, str, str, str]:
        """Draws the answers of both checkpoints, and where they differ for a phrase."""
        session, asked, inspection = _of(session)
        if len(asked.inspections) < 2:
            raise RequestError("There is one checkpoint; start the demo with --against DIR to compare it with another.")
        rule, phrase = rule_of(threshold, selection, presence), phrase_index(chosen, inspection)
        found = [rule.answers(one) for one in asked.inspections]
        drawn = [
            *(views.annotated_image(inspection, answers, phrase) for answers in found),
            views.difference_image(inspection, found[0], found[1], phrase),
        ]
        first, second, difference = (session.write_image("compared", image) for image in drawn)
        return first, second, difference, views.comparison_table(found[0], found[1], self._names)

    def export(
        self, session: Session | None, threshold: Any, selection: Any, presence: Any
    ) -> tuple[list[str], str, str]:
        """Writes masks and answers at the size of the image."""
        session, asked, inspection = _of(session)
        rule = rule_of(threshold, selection, presence)
        answers = rule.answers(inspection, max_side=None)
        masks, lines = session.file("masks.zip"), session.file("answers.json")
        files.write_masks(asked.path.name, answers, masks)
        files.write_answers(asked.path.name, answers, lines)
        return (
            [str(masks), str(lines)],
            files.predict_command(self._checkpoint, asked.path.name, inspection, rule),
            self._gone(),
        )

    def find_in_video(
        self,
        session: Session | None,
        video: Any,
        phrases: Any,
        threshold: Any,
        selection: Any,
        presence: Any,
        request: gr.Request,
        progress: gr.Progress = _PROGRESS,
    ) -> tuple[Session, str, str | None, str]:
        """Asks phrases of every frame of a video: a legend, the video with the masks drawn, and the masks in a zip file."""
        session = self._sessions.get(str(request.session_hash))
        path = self._path_of(video, "video")
        session.uploads.add(path)

        def on_frame(number: int, num_frames: int | None) -> None:
            known = "" if num_frames is None else f" of {num_frames}"
            progress((number, num_frames), desc=f"frame {number}{known}", unit="frames")

        rule = rule_of(threshold, selection, presence)
        saved = answer_video(self.service, session, path, lines_of(phrases), rule, on_frame=on_frame)
        masks = session.file(f"{saved.name}-masks.zip")
        files.write_video_masks(saved, masks)
        shutil.rmtree(saved.masks)
        error = "" if saved.error is None else f"<p><b>{html.escape(told(path, saved.error))}</b></p>"
        about = f'<p class="deris-note">{count_of(saved.num_frames, "frame")}, {saved.seconds:.1f} s. Sound is not copied.</p>'
        overlay = None if saved.overlay is None else str(saved.overlay)
        return session, error + views.video_legend(saved) + about, overlay, str(masks)

    def choose(
        self, session: Session | None, threshold: Any, selection: Any, presence: Any, chosen: Any, event: gr.SelectData
    ) -> int:
        """Returns the phrase whose mask was clicked."""
        _, _, inspection = _of(session)
        answers = rule_of(threshold, selection, presence).answers(inspection)
        width, height = views.display_size(inspection)
        column, row = event.index
        found = views.phrase_at(answers, (column + 0.5) / width, (row + 0.5) / height)
        return phrase_index(chosen, inspection) if found is None else found

    def segment(
        self, picture: Any, phrases: Any, threshold: Any = None, selection: Any = None, presence: Any = None
    ) -> list[dict[str, Any]]:
        """Answers phrases about an image in one call, without a session: a list with one object per phrase."""
        path = self._path_of(picture)
        rule = rule_of(threshold, selection, presence)
        try:
            inspection = self.service.inspect(path, lines_of(phrases))[0]
            return files.answers_json(path.name, rule.answers(inspection, max_side=None))
        finally:
            if self._is_upload(path) and not self._sessions.uses(path):
                path.unlink(missing_ok=True)

    def leave(self, request: gr.Request) -> None:
        """Frees a user's session when the page or the client is closed."""
        self._sessions.close(str(request.session_hash))

    def _path_of(self, given: Any, kind: str = "image") -> Path:
        """Returns the file of an image or video that a client sent; gradio checks only some clients' paths."""
        return upload(given, self.folder, kind)

    def _is_upload(self, path: Path) -> bool:
        return not path.is_relative_to(self._example_folder)

    def _gone(self) -> str:
        is_path = not self._checkpoint.startswith("builtin:")
        if is_path and not Path(self._checkpoint).expanduser().exists() and "/" in self._checkpoint:
            return f"The folder {html.escape(self._checkpoint)} is not there any more; the demo answers from memory."
        return ""

    # -- what the page looks like ------------------------------------------------------------------------------------

    def _built(self) -> gr.Blocks:
        config = self.service.pipelines[0].config
        default = config.evaluation
        with gr.Blocks(
            title="deris_llm", analytics_enabled=False, delete_cache=_CLEAN_SECONDS, fill_width=True
        ) as blocks:
            session = gr.State(None, time_to_live=_SESSION_SECONDS, delete_callback=_close)
            gr.HTML(self._head(), elem_id="deris-head")
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    picture = gr.Image(
                        type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=280,
                        elem_id="picture", buttons=[],
                    )  # fmt: skip
                    phrases = gr.Textbox(
                        lines=3, max_lines=12, label="Phrases, one a line", placeholder="the red car\nthe man who crosses",
                        elem_id="phrases",
                    )  # fmt: skip
                    button = gr.Button("Find", variant="primary", elem_id="find")
                    threshold = gr.Slider(
                        0, 1, value=default.score_threshold, step=0.01, label="Score threshold", elem_id="threshold", buttons=[],
                    )  # fmt: skip
                    with gr.Accordion("Selection and presence", open=False):
                        selection = gr.Radio(
                            [(said, name) for name, said in _SELECTIONS.items()], value=default.selection,
                            label="Queries in the answer", elem_id="selection",
                        )  # fmt: skip
                        presence = gr.Radio(
                            [(said, name) for name, said in _PRESENCE.items()], value=default.presence,
                            label="Presence probability", elem_id="presence",
                        )  # fmt: skip
                    if self._examples:
                        gr.Examples(
                            [list(example) for example in self._examples], [picture, phrases], label="Examples",
                            cache_examples=False, examples_per_page=8, visible_columns=[0], api_visibility="private",
                        )  # fmt: skip
                with gr.Column(scale=3, min_width=300):
                    drawn = gr.Image(
                        type="filepath", interactive=False, label="Answers", show_label=False, elem_id="answers",
                        buttons=["download", "fullscreen"], height="auto",
                    )  # fmt: skip
                    legend = gr.HTML(elem_id="legend")
                    chosen = gr.Dropdown(
                        [],
                        type="value",
                        label="Selected phrase",
                        interactive=True,
                        elem_id="chosen",
                        allow_custom_value=True,
                    )
                    with gr.Tabs():
                        with gr.Tab("Rounds", elem_id="tab-rounds"):
                            rounds = gr.Slider(
                                0,
                                2,
                                value=0,
                                step=1,
                                label="Selected phrase: its best query in this round (left) and in the next one (right)",
                                elem_id="rounds",
                                buttons=[],
                            )
                            pair = gr.ImageSlider(
                                type="filepath", interactive=False, label="Best query by round", show_label=False, elem_id="pair",
                                buttons=[],
                            )  # fmt: skip
                            gr.HTML('<p class="deris-note">Highest referring score of each phrase by round</p>')
                            chart = gr.HTML(elem_id="chart")
                        with gr.Tab("Queries", elem_id="tab-queries"):
                            queries = gr.Gallery(
                                label="Queries of the selected phrase; framed = in the answer", columns=4,
                                object_fit="contain", height="auto", elem_id="queries", buttons=[], type="filepath",
                            )  # fmt: skip
                        with gr.Tab("Compare", visible=len(self._names) > 1, elem_id="tab-compare"):
                            with gr.Row():
                                compared = [
                                    gr.Image(type="filepath", interactive=False, label=name, buttons=[], min_width=240)
                                    for name in (self._names + ["", ""])[:2]
                                ]
                            difference = gr.Image(
                                type="filepath", interactive=False, buttons=[],
                                label="Selected phrase: white = both, orange = the first alone, blue = the second alone",
                            )  # fmt: skip
                            table = gr.HTML(elem_id="comparison")
                        with gr.Tab("Export", elem_id="tab-export"):
                            make = gr.Button("Make files", elem_id="make")
                            made = gr.File(
                                file_count="multiple", interactive=False, label="Masks and answers", elem_id="made"
                            )
                            command = gr.Code(
                                language="shell", label="The same answers on the command line", interactive=False,
                                elem_id="command",
                            )  # fmt: skip
                            gone = gr.HTML()
                        with gr.Tab("Video", elem_id="tab-video"):
                            limits = self.service.limits
                            gr.HTML(
                                '<p class="deris-note">The phrases and settings of the page are asked of every frame. At most '
                                f"{limits.max_video_seconds:g} seconds, {limits.max_video_megapixels:g} megapixels a frame and "
                                f"{limits.max_file_mb} MB.</p>"
                            )
                            video = gr.Video(sources=["upload"], label="Video", height=240, elem_id="video", buttons=[])
                            find_video = gr.Button("Find in the video", variant="primary", elem_id="find-video")
                            video_legend = gr.HTML(elem_id="video-legend")
                            video_drawn = gr.Video(
                                label="Answers", interactive=False, elem_id="video-answers", buttons=["download"]
                            )
                            video_masks = gr.File(interactive=False, label="Masks", elem_id="video-masks")
            for component in (phrases, threshold, selection, presence, chosen, rounds):
                _leave_unchecked(component)
            for component in (picture, video):
                _leave_file_unread(component)

            rule = [threshold, selection, presence]
            views_of = {
                "answers": (self.show_answers, [session, *rule, chosen], [drawn, legend]),
                "rounds": (self.show_rounds, [session, chosen, rounds], [pair, chart]),
                "queries": (self.show_queries, [session, *rule, chosen], [queries]),
                "compare": (self.show_comparison, [session, *rule, chosen], [*compared, difference, table]),
            }
            if len(self._names) < 2:
                del views_of["compare"]
            shown = {name: (_said(fn), inputs, outputs) for name, (fn, inputs, outputs) in views_of.items()}
            for name, (fn, inputs, outputs) in shown.items():
                gr.on([], fn, inputs, outputs, api_name=name)  # over HTTP
            private: dict[str, Any] = {
                "api_visibility": "private",
                "show_progress": "hidden",
                "trigger_mode": "always_last",
            }

            def show(start: Callable[..., Any], names: Sequence[str]) -> None:
                for name in names:
                    if name in shown:
                        fn, inputs, outputs = shown[name]
                        start(fn, inputs, outputs, **private)

            asking: dict[str, Any] = {"inputs": [session, picture, phrases], "outputs": [session, chosen, rounds]}
            asked = button.click(_said(self.ask), **asking, api_name="ask", show_progress_on=drawn)
            show(asked.success, ("answers", "rounds", "queries", "compare"))
            for setting in rule:
                show(setting.input, ("answers", "queries", "compare"))
            show(chosen.input, ("answers", "rounds", "queries", "compare"))
            show(rounds.input, ("rounds",))
            clicked = drawn.select(_said(self.choose), [session, *rule, chosen], chosen, **private)
            show(clicked.success, ("answers", "rounds", "queries", "compare"))
            make.click(_said(self.export), [session, *rule], [made, command, gone], api_name="export")
            find_video.click(
                _said(self.find_in_video),
                [session, video, phrases, *rule],
                [session, video_legend, video_drawn, video_masks],
                api_name="video",
                show_progress_on=video_legend,
            )
            self._add_segment(picture)
            blocks.unload(_said(self.leave))
        return blocks

    def _add_segment(self, picture: gr.Image) -> None:
        """Adds the endpoint that needs no session; its fields are not on the page."""
        fields = [
            gr.JSON(visible=False, label=name) for name in ("phrases", "score_threshold", "selection", "presence")
        ]
        for component in fields:
            _leave_unchecked(component)
        answers = gr.JSON(visible=False, label="answers")
        gr.on([], _said(self.segment), [picture, *fields], answers, api_name="segment")

    def _head(self) -> str:
        pipeline = self.service.pipelines[0]
        against = f" against {html.escape(self._names[1])}" if len(self._names) > 1 else ""
        note = f"<p>{html.escape(self._note)}</p>" if self._note else ""
        return (
            f"<h1>deris_llm: {html.escape(self._names[0])}{against}</h1>"
            f"<p>{html.escape(pipeline.threshold_source)}; on {pipeline.device.type.upper()}</p>{note}"
        )


class _OneLine:
    """Stands for `traceback` where gradio prints what it refuses: a client's mistake is one line of the log."""

    @staticmethod
    def print_exc() -> None:
        logger.warning("gradio refused a request: %s", " ".join(str(sys.exc_info()[1]).split())[:300])


queueing.traceback = _OneLine  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]


# -- values of the page ----------------------------------------------------------------------------------------------


def _said(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns errors into messages on the page and of the API, without a traceback for those that a user can correct."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False, title="This did not work") from None
        except Exception:
            logger.exception("%s failed", function.__name__)
            message = "The demo failed on this, and its log says why; tell whoever runs it."
            raise gr.Error(message, print_exception=False) from None

    # gradio passes `gr.Request` and `gr.SelectData` by annotation, which `from __future__ import annotations` makes text.
    call.__signature__ = python_inspect.signature(function, eval_str=True)  # pyright: ignore[reportAttributeAccessIssue]
    call.__annotations__ = python_inspect.get_annotations(function, eval_str=True)
    return call


def _leave_unchecked(component: Any) -> None:
    component.preprocess = lambda payload: payload


def _leave_file_unread(component: Any) -> None:
    """Makes an image or video component give its file unread: gradio's own reading ends in a traceback if the file is broken."""
    component.preprocess = lambda payload: None if payload is None else payload.path


def _close(session: Session | None) -> None:
    if session is not None:
        session.close()


def _of(session: Session | None) -> tuple[Session, Asked, Inspection]:
    asked = None if session is None else session.asked
    if session is None or asked is None:
        raise RequestError(_NO_ANSWER)
    return session, asked, asked.inspections[0]


def _about(asked: Asked) -> str:
    number = len(asked.inspections[0].phrases)
    said = f"{count_of(number, 'phrase')}, {asked.seconds:.2f} s. "
    said += "Click a mask to select its phrase. Settings and tabs do not run the network again."
    return f'<p class="deris-note">{said}</p>'
