"""Cache-aware streaming FastConformer: encoder, CTC and RNN-T heads, checkpoint readers."""
