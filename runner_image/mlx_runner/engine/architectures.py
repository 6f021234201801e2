"""The architectures that are tested token for token against mlx-lm in one process: modules of mlx_lm.models.

No other one is refused for not being here: a pipeline is judged by the structure of the model at hand. docs/models.md
shows these, and `tests/runner/test_architectures.py` holds them.
"""

PIPELINE = (
    "afmoe",
    "apertus",
    "bailing_moe",
    "cohere",
    "cohere2",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "helium",
    "hunyuan_v1_dense",
    "internlm2",
    "internlm3",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "mamba",
    "mimo",
    "minicpm",
    "minimax",
    "ministral3",
    "mixtral",
    "nanochat",
    "nemotron",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "step3p5",
    "telechat3",
    "youtu_llm",
)
"""With sharding: Pipeline."""
TENSOR = (
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "llama",
    "minimax",
    "ministral3",
    "qwen2",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_moe",
    "step3p5",
)
"""With sharding: Tensor, which only these offer."""
TENSOR_TWO_ONLY = ("glm4_moe", "glm4_moe_lite", "step3p5")
"""Of these with two ranks only: their tiny models have parts that three cannot share."""
STATES = ("falcon_h1", "lfm2", "lfm2_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next")
"""Those with a recurrent state whose code keeps the padding beside a shorter prompt out of it.

Not all of mlx-lm's does (mamba's: answers of a batch would differ from those of a request alone), and no rehearsal
without weights can tell; so a model with a state that is not here computes one request at a time.
"""


def architecture(model_class: type) -> str:
    """Module of mlx_lm.models that implements a model (after mlx-lm's own remapping)."""
    for base in model_class.__mro__:
        if base.__module__.startswith("mlx_lm.models."):
            return base.__module__.rpartition(".")[2]
    return model_class.__module__
