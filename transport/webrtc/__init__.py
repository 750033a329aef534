"""WebRTC (aiortc): peers, and our own audio paths under them."""
