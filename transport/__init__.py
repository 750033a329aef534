"""Ways in and out of a graph: files, microphone and speaker, WebRTC, and websocket protocols."""
