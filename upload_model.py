#!/usr/bin/env python3
"""Share a trained model: write it as a standard GPT-2 folder for transformers, and upload it.

    python upload_model.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors exported/demo
    python upload_model.py runs/demo/model.json runs/demo/checkpoints/best/model.safetensors ME/demo --push

The folder loads with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, without this
project's code. Before the folder gets its name or is pushed, transformers loads it and its logits are
compared with gpt.py's.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path

import click

from basemodel.common.command_line import run_command
from basemodel.common.errors import InputError
from basemodel.common.files import contents, make_folder, publish, work_folder
from basemodel.data.hub import check_push, push
from basemodel.data.tokenizer import get_tokenizer
from basemodel.model.generation import require_vocabulary
from basemodel.model.weights import folder_of, load_model
from basemodel.results.export import check_folder, write_model, write_model_card


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_json", type=Path)
@click.argument("model_safetensors", type=Path)
@click.argument("destination", metavar="OUTPUT_DIR|REPO_ID")
@click.option("--push", "pushes", is_flag=True, help="Upload the folder to the Hub as REPO_ID, OWNER/NAME.")
@click.option("--private", is_flag=True, help="Make the repository private if it is new.")
@click.option("--license", help="License for the model card, in the Hub's spelling: apache-2.0, mit, ...")
def main(
    model_json: Path,
    model_safetensors: Path,
    destination: str,
    pushes: bool,
    private: bool,
    license: str | None,
) -> None:
    """Write the model in MODEL_SAFETENSORS as a standard GPT-2 folder for transformers, with a model card.

    Without --push, the folder is OUTPUT_DIR. With --push, a temporary folder is uploaded to REPO_ID.
    """
    try:
        import transformers
    except ImportError:
        raise InputError('transformers is missing; install it with: pip install -e ".[upload]"') from None
    transformers.utils.logging.disable_progress_bar()
    output = Path(destination)
    if pushes:
        check_push(destination)
    elif private:
        raise InputError("--private goes with --push")
    elif output.exists() and (not output.is_dir() or contents(output)):
        raise InputError(f"{output}: already exists; remove it or choose another folder")
    model = load_model(model_json, model_safetensors).cpu()
    if not all(tensor.isfinite().all() for tensor in model.tensors().values()):
        raise InputError(f"{model_safetensors}: contains NaN or infinite weights")
    tokenizer = get_tokenizer(model.config.tokenizer, folder_of(model_safetensors))
    require_vocabulary(model, tokenizer)
    work = Path(tempfile.mkdtemp()) if pushes else work_folder(output)
    folder = work / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make_folder(folder)
        write_model(folder, model, tokenizer)
        name = destination if pushes else output.resolve().name
        write_model_card(folder, name, model, model_safetensors, license)
        check_folder(folder, model, tokenizer)
        if pushes:
            print(f"Pushed: {push(folder, destination, 'Upload the model', private=private)}")
        else:
            publish(folder, output, last="config.json")
            print(f"Written to {output}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            work.rmdir()


if __name__ == "__main__":
    run_command(main)
