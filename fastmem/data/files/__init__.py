"""Data sets as files of nanoGPT, llm.c, Megatron-LM, NumPy, Parquet and safetensors."""
