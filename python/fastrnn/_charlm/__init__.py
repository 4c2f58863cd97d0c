"""The character language model behind ``fastrnn train`` and ``fastrnn sample``, one file a job."""
