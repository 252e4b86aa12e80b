"""What a program in an interpreter of its own begins with to watch its anonymous memory."""

WATCH = """
import json, re, sys, threading, time, torch
torch.set_num_threads(1)
most = 0
def watch():
    global most
    while True:
        now = re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]
        most = max(most, 1024 * int(now))
        time.sleep(0.002)
"""
"""One thread; ``most`` holds the most bytes seen since ``watch`` was started in a thread."""
