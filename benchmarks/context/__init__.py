"""What compressing a context costs: fidelity on documents, needles, and rules of long dialogues."""
