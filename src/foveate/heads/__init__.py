"""Looking into attention heads and training small things on them: taps, gates, and the texts they are trained on."""
