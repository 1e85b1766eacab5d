"""Find, load, walk and save a model: sources, Plan, QuantLinear, checkpoint formats.

Modules, lowest first: `gguf` and `source` (where tensors come from), `walk` (decoder blocks, linears,
fusion groups), `plan` (what is quantized how), `rotation` (block-Hadamard matrices in front of a
layer), `linear` (a quantized linear layer), `compressed_tensors` and `native` (the two schemas on
disk), `checkpoint` (writing), `load` (reading), `decoding` (a loaded model on the native decoder),
`direct` (that decoder from the files alone), `hf` (transformers' quantizer hooks).
"""
