from hallubench.cli import main

if __name__ == "__main__":  # vLLM's processes import this module again
    main(prog_name="hallubench")
