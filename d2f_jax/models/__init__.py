"""Stable Diffusion's networks in Flax NNX: NHWC, sub-modules named after the checkpoints' keys.

Shape letters: B batch, H height, W width, C channels, L and M tokens, N heads, D width of a token or head.
Every module takes `dtype`, which it computes in, and `param_dtype`, which it keeps parameters in; norms, softmax and
the time embedding compute in float32 whatever `dtype` is.
"""
