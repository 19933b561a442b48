"""From a GGUF file to a plain Hugging Face folder, by transformers."""

from __future__ import annotations

import importlib.util
import json
import warnings
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pagedattn.models.folder import FetchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PACKAGES = ("torch", "transformers", "gguf", "accelerate", "safetensors")
"""What a conversion imports; transformers needs gguf and accelerate to read GGUF."""

# said so that transformers 4 knows the class and gives the model no token types
_TOKENIZER: Mapping[str, object] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
}


def check_packages() -> None:
    """Raise :class:`FetchError` if a package that a conversion needs is missing or too old."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(
            f"Converting the model needs {', '.join(missing)}, not installed here; "
            f"run pip install {' '.join(missing)}."
        )
    found = metadata.version("transformers")
    if int(found.split(".")[0]) < 5:  # known to read the tokenizer wrongly
        raise FetchError(
            f"Converting the model needs transformers 5 or newer, and {found} is installed; "
            "run pip install --upgrade transformers."
        )


def versions() -> dict[str, str]:
    """Return the installed version of each package that a conversion needs."""
    return {name: metadata.version(name) for name in PACKAGES}


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file into `folder`, dequantised to bfloat16.

    The folder then holds config.json (without ``quantization_config``), generation_config.json,
    model.safetensors and the tokenizer with its chat template.

    Raises:
        FetchError: the installed packages cannot do it; `folder` may hold some of the files.

    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages about each other
            _convert(gguf, folder)
    except FetchError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file system, not transformers' for a file that it does not understand
        raise FetchError(
            f"transformers {metadata.version('transformers')} could not convert {gguf.name} "
            f"({type(error).__name__}: {error}); try pip install --upgrade transformers gguf."
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    options = dict(place)
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep weights packed otherwise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        str(gguf.parent), dtype=torch.bfloat16, **options
    )
    # a model that remembers its quantisation cannot be saved, so its weights move to a plain one
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(folder, max_shard_size="100GB")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **place)
    _check_tokenizer(tokenizer, config)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    _tidy(folder, gguf.name.split(".")[0], config.rope_parameters["rope_theta"])


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer that was read as another one, as transformers 4.56 and 5.0 do.

    There the end-of-text token is the beginning's, and that is put before every text.
    """
    read = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.encode(""))
    if read != (config.bos_token_id, config.eos_token_id, []):
        raise FetchError(
            f"transformers {metadata.version('transformers')} reads the model's tokenizer wrongly; "
            "run pip install --upgrade transformers."
        )


def _tidy(folder: Path, name: str, rope_theta: float) -> None:
    """Name the model, and write what transformers 4 reads beside what transformers 5 does."""
    foreign = {"_model_name_or_path", "quantization_config"}
    _edit(folder / "config.json", foreign, {"_name_or_path": name, "rope_theta": rope_theta})
    foreign = {"backend", "is_local", "local_files_only", "name_or_path"}
    _edit(folder / "tokenizer_config.json", foreign, _TOKENIZER)
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _edit(path: Path, drop: set[str], put: Mapping[str, object]) -> None:
    loaded = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in loaded.items() if key not in drop} | dict(put)
    text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8", newline="\n")
