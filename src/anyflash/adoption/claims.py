"""What FlashAttention's adoption page, or the system that it names, claims, and what our rows show of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """text: what is claimed; source: where; here: what of it the rows of this page measure, and what not."""

    text: str
    source: str
    here: str


CLAIMS = {
    "PyTorch": Claim(
        "integrated into nn.Transformer, faster without a change of code; no number.",
        "pytorch/pytorch #81434, July 2022",
        "torch's own registry gives the same door on a CPU; a whole training step is timed.",
    ),
    "Hugging Face transformers": Claim(
        "on-going integration; no number.",
        "huggingface/transformers #18439, August 2022",
        "today its models take an attention by name; whole models are timed.",
    ),
    "Hugging Face diffusers": Claim(
        "up to 2 times faster generation with less memory, by way of xformers.",
        "diffusers 0.7.0, pull request #532, on a GPU",
        "the attention's share in one denoising step of a UNet. The factor itself needs a GPU.",
    ),
    "xformers": Claim(
        "memory_efficient_attention dispatches to FlashAttention where it is available or faster; no number.",
        "xformers' documentation",
        "xformers has no operator for a CPU, so ours is beside the formed scores and torch's attention.",
    ),
    "DeepSpeed": Claim(
        "its inference engine uses FlashAttention; no number.",
        "FlashAttention's adoption page",
        "its science kernel for Evoformer attention, which it has for CUDA alone.",
    ),
    "Megatron-LM": Claim(
        "1.63 times at length 4096 and 2.25 times at 8192 for a model of 1 B parameters.",
        "bigcode's Megatron-LM, pull request #41, on GPUs",
        "a GPT's training step, at a width and depth that two cores can train. The factors need GPUs.",
    ),
    "Hugging Face transformers, flash_attention_2": Claim(
        "a drop-in attention for any model that asks for it, on CUDA.",
        "flash-attention's README",
        "programs that import flash_attn, unchanged, on a machine without a GPU.",
    ),
    "labml-nn": Claim(
        "50% faster Stable Diffusion.",
        "labml.ai, on a GPU",
        "a block of its UNet, which imports flash_attn, and the whole UNet. The factor needs a GPU.",
    ),
    "OpenFold": Claim(
        "up to 3 times faster than AlphaFold 2 on short sequences, and twice longer ones.",
        "FlashAttention's adoption page, of the whole model on a GPU",
        "triangle attention, which takes the most memory of it, beside its own chunks: time, memory, and the "
        "longest protein in the same memory. The factors need the whole model and a GPU.",
    ),
    "Uni-Fold": Claim(
        "2.6 times faster than AlphaFold; FlashAttention's part of it is about 20%.",
        "FlashAttention's adoption page; flash-attention, pull request #57, on GPUs",
        "a whole iteration of its Evoformer, forward and backward, and triangle attention as OpenFold's. The "
        "factor needs the system and GPUs.",
    ),
    "Stable Diffusion, CompVis": Claim(
        "no number for this code; the factors on the page are of its descendants.",
        "FlashAttention's adoption page",
        "three levels of its UNet, which hold all of its attention.",
    ),
    "Stable Diffusion, Hazy Research": Claim(
        "3 to 4 times faster generation than diffusers without optimisation.",
        "Hazy Research, October 2022, on an A100",
        "the fork's UNet with its attention alone exchanged; half precision and a GPU are in the factor.",
    ),
    "Composer": Claim(
        "a library for efficient training that uses FlashAttention; no number.",
        "FlashAttention's adoption page",
        "all that its Trainer does for a GPT-2, to which an algorithm gives our attention.",
    ),
    "llm-foundry": Claim(
        "MPT models ask for FlashAttention by attn_impl; no number.",
        "mosaicml/llm-foundry, for CUDA",
        "MPT's layers with ALiBi, whose own attention on a CPU forms the scores.",
    ),
    "MosaicBERT": Claim(
        "a faster BERT by FlashAttention, ALiBi, gated units and unpadding together.",
        "mosaicml/examples, on GPUs",
        "attention alone: every variant has the other three, and unpads its other layers.",
    ),
    "PubMedGPT": Claim(
        "FlashAttention alone nearly halved the training time of a GPT of 2.7 B parameters.",
        "FlashAttention's adoption page, on A100s in bfloat16",
        "one of its layers at full width, where a CPU spends nearly all of its time in products of matrices: "
        "the factor needs a GPU. The losses are the same.",
    ),
    "GPT-NeoX": Claim(
        "about 2 times faster training at length 4096, for models of 100 M to 3 B parameters.",
        "EleutherAI/gpt-neox, pull request #725, on GPUs",
        "NeoX's own layers in a training step; a GPU would be needed for the factor.",
    ),
    "MLPerf BERT": Claim(
        "the fastest BERT training on cloud instances, in MLPerf training 2.0 and 2.1.",
        "FlashAttention's adoption page; 17.4 minutes on 8 A100s in the results 2.0",
        "the recipe without padding, in which attention is one gain of several: the first row shows its own, "
        "the second adds that of the missing padding. The minutes need GPUs.",
    ),
    "Colossal-AI": Claim(
        "Stable Diffusion's pretraining 6.5 times faster, its fine-tuning 7 times cheaper.",
        "FlashAttention's adoption page, of the whole system on GPUs",
        "its attention alone, on a padded batch. Sharding and larger batches are in the factors.",
    ),
    "Kernl": Claim(
        "up to 12 times faster transformers inference.",
        "Kernl's README, on an RTX 3090",
        "the attention's share in a BERT whose graph is rewritten. Most of the factor is CUDA graphs.",
    ),
    "AITemplate": Claim(
        "up to 5.3 times faster BERT inference.",
        "AITemplate's README, on an A100",
        "the same graph, run without its compiler, beside transformers' BERT. The factor needs a GPU.",
    ),
    "FasterTransformer": Claim(
        "uses FlashAttention for a GPT's prompts since 5.2; no number.",
        "NVIDIA/FasterTransformer, release 5.2, December 2022",
        "its interface of context and decoding, with our attention in it, on a CPU.",
    ),
}


def of(system: str) -> Claim | None:
    return CLAIMS.get(system)
