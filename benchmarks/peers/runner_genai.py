"""onnxruntime-genai, greedy. Mode: `one`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from protocol import Begin, Step, main


def imports() -> Mapping[str, str]:
    from importlib.metadata import version

    import onnxruntime_genai  # noqa: F401  # its import belongs to this time

    return {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}


def load(args: argparse.Namespace) -> tuple[Mapping[str, Begin], int]:
    import onnxruntime_genai as og

    config = og.Config(str(args.folder))
    options = {"session_options": {"intra_op_num_threads": args.threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = og.Model(config)
    vocabulary = json.loads((args.folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"]

    def begin(prompt: list[int]) -> Step:
        params = og.GeneratorParams(model)
        # min_length: an end token must not end the run.
        params.set_search_options(max_length=args.context, min_length=args.context, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        generator.generate_next_token()  # takes the first token from the prompt's logits

        def step() -> int:
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        return step

    return {"one": begin}, vocabulary


if __name__ == "__main__":
    main(imports, load)
