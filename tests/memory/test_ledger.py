from halfbyte.memory.ledger import Ledger


def test_the_peak_remembers_who_held_what_and_when():
    ledger = Ledger({"weights": 1024})
    ledger.moment = "forward"
    ledger.take("activations", 2048)
    with ledger.hold("workspace", 512, 512):
        ledger.moment = "backward"
    ledger.give("activations", 2048)
    ledger.take("gradients", 1024)
    assert ledger.nbytes == 2048
    assert ledger.peak.nbytes == 4096
    assert ledger.peak.moment == "forward"
    assert ledger.peak.owners == {"weights": 1024, "activations": 2048, "workspace": 1024}


def test_bytes_are_rounded_as_the_allocator_does():
    ledger = Ledger()
    ledger.take("scalar", 4)
    assert ledger.nbytes == 512
    ledger.give("scalar", 4)
    assert ledger.nbytes == 0
