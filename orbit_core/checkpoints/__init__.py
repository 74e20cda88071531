"""Checkpoints on disk: Hugging Face directories and Megatron `torch_dist`, streaming and byte-preserving.

    hf.py        HFCheckpoint, HFWriter, load_packed       quantizer.py  BF16 -> a packed format
    megatron.py  MegatronCheckpoint, to_megatron, to_hf    quantization.py  quantization_config, read and written

Both checkpoints answer `load_packed()` -> (module, PackedWeight) and `load_plain()` -> (name, tensor) in HF names.
"""
