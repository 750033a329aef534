"""CosyVoice 2: text to speech tokens, speech tokens to mel frames (arXiv 2412.10117)."""
