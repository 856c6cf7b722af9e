"""The rotary entries of published configs, by model: config.json of huggingface.co/NAME unless a comment says more."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["CONFIGS", "LONG_FACTOR", "SHORT_FACTOR", "Config"]


class Config(NamedTuple):
    """The arguments of `rotary_frequencies` for a model."""

    dim: int
    base: float | None
    scaling: dict[str, Any] | None
    outside: dict[str, Any]
    """The keys outside of the dictionary."""


def config(dim: int, base: float | None, scaling: dict[str, Any] | None, **outside: Any) -> Config:
    return Config(dim, base, scaling, outside)


LONG_FACTOR = [
    *(1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968),
    *(1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525),
    *(1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164),
    *(5.489999771118164, 9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355),
    *(15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203),
    *(32.35000228881836, 32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156),
    *(56.20000457763672, 57.95000457763672, 59.29000473022461, 59.77000427246094, 59.920005798339844),
    *(61.190006256103516, 61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086),
    *(63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922, 64.760009765625),
    *(64.80001068115234, 64.81001281738281, 64.81001281738281),
]
SHORT_FACTOR = [
    *(1.05, 1.05, 1.05, 1.1, 1.1, 1.1, 1.2500000000000002, 1.2500000000000002, 1.4000000000000004, 1.4500000000000004),
    *(1.5500000000000005, 1.8500000000000008, 1.9000000000000008, *[2.000000000000001] * 19, 2.1000000000000005),
    *(2.1000000000000005, 2.2, 2.3499999999999996, 2.3499999999999996, 2.3499999999999996, 2.3499999999999996),
    *(2.3999999999999995, 2.3999999999999995, 2.6499999999999986, 2.6999999999999984, 2.8999999999999977),
    *(2.9499999999999975, 3.049999999999997, 3.049999999999997, 3.049999999999997),
]
"""Of Phi-3-vision-128k-instruct."""

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
DEEPSEEK = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}
GPT_OSS = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False}
OLMO3 = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.2079441541679836}

CONFIGS: dict[str, Config] = {
    "meta-llama/Llama-2-7b": config(128, 10000.0, None),
    "meta-llama/Llama-3.1-8B": config(
        128, 500000.0, LLAMA3 | {"factor": 8.0, "high_freq_factor": 4.0}, max_position_embeddings=131072
    ),
    "meta-llama/Llama-3.2-1B": config(
        64, 500000.0, LLAMA3 | {"factor": 32.0, "high_freq_factor": 4.0}, max_position_embeddings=131072
    ),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": config(
        128, 500000.0, LLAMA3 | {"factor": 16.0, "high_freq_factor": 1.0}, max_position_embeddings=10485760
    ),
    "Qwen/Qwen2.5-7B-Instruct": config(  # the model card, "Processing Long Texts"
        128, 1000000.0, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    ),
    "Qwen/Qwen2-VL-7B-Instruct": config(128, 1000000.0, {"type": "mrope", "mrope_section": [16, 24, 24]}),
    "Qwen/Qwen3.5-4B": config(
        256,
        None,
        {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
    ),
    "NousResearch/Yarn-Llama-2-7b-64k": config(
        128, None, {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "finetuned": True}
    ),
    "deepseek-ai/DeepSeek-V3": config(
        64, 10000, DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 1.0}, max_position_embeddings=163840
    ),
    "deepseek-ai/DeepSeek-V2-Lite": config(
        64, 10000, DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.707}, max_position_embeddings=163840
    ),
    "openai/gpt-oss-20b": config(
        64, 150000, GPT_OSS | {"original_max_position_embeddings": 4096}, max_position_embeddings=131072
    ),
    "allenai/Olmo-3-32B-Think": config(
        128, 500000, OLMO3 | {"original_max_position_embeddings": 8192}, max_position_embeddings=65536
    ),
    "mistralai/Ministral-3-8B": config(  # the defaults of configuration_ministral3.py in transformers 5.23
        128,
        None,
        {
            "type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "max_position_embeddings": 262144,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "microsoft/Phi-3-vision-128k-instruct": config(
        96,
        10000.0,
        {"type": "su", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR},
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
    ),
    "google/gemma-3-4b-it": config(256, 1000000.0, {"rope_type": "linear", "factor": 8.0}),
    "google/gemma-4-31B-it": config(  # the global layers; the defaults of configuration_gemma4.py in transformers 5.23
        512, None, {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
    ),
    "internlm/internlm3-8b-instruct": config(
        128, 50000000, {"rope_type": "dynamic", "factor": 6.0}, max_position_embeddings=32768
    ),
    "EleutherAI/gpt-neox-20b": config(96, 10000, None, partial_rotary_factor=0.25),
    "microsoft/phi-2": config(80, 10000.0, None, partial_rotary_factor=0.4),
}
