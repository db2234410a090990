"""What reads the wire, fed with bytes of a fuzzer's making."""
