"""`python -m llama_multimodal`: the command line, as torchrun starts it."""

from .cli import main

if __name__ == "__main__":
    main()
