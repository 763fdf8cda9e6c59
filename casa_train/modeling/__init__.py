"""The model: everything that training and an export share.

The folder is flat, imports nothing of the project and needs torch, transformers, einops, pillow and
numpy only: it is copied whole into every export, so training and inference run the same code.

    processing_casa   messages -> a batch, as users of transformers expect it
    encoding          messages -> ids, insertion points, labels; batching: side by side, padded
    image_processing_casa    images -> uint8 tensors; image_sources: from files, bytes and URLs
    chat_template     its pieces, as jinja and read out of rendered text        messages
    text_ids          text and special tokens -> ids, as the tokenizer gives them for the whole text
    windows           insertion points + lengths -> windows, positions, interleaving (pure integers)
    packed            PackedInputs, a pack as the model reads it
    segments          which queries attend to which keys, as attention kernels want it
    attention, rope   one varlen attention call, three backends; rotary positions
    vision            Qwen2.5-VL's tower from uint8 images
    image_attention   listens to what text reads from images, when it is asked for
    block             the pieces of a decoder block, and what the blocks of a forward pass share
    block_work        the same pieces on paper: their floating-point work
    fusion            the interface of a fusion mechanism and how to add one; registry in mechanisms
    windowed          keys laid out by windows: the ground of casa, gated and hyper
    window_attention  what CASA and plain cross-attention share, with the switches D1 and D3 to D5
    casa              CASA, and the switch D2 to cross_attention
    gated, hyper      Flamingo's gated cross-attention, mPLUG-Owl3's hyper attention
    insertion         image tokens in the stream; qformer: compressed first
    decoder           Hugging Face decoder layers as weight containers, our own loop over them
    activation_checkpointing    blocks that keep their inputs alone and run twice
    streaming         what generation remembers beside the KV cache
    padded            batches of Hugging Face's interface as chunks
    outputs           the cache under both of its names, outputs and losses
    generation        generate, generate_from_image, streams
    modeling_casa     CasaForConditionalGeneration: the parts put together

A new mechanism is one file and one YAML: see `fusion.py`.

Shapes: B batch, T text tokens, N image tokens, S stream tokens (T, or T + N where images are
inserted), W windows, H heads, D head width, C model width. Samples of a batch or pack are
concatenated along the token axis; there is no padding inside the model.
"""
