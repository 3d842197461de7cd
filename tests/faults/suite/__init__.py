"""The fault suite: real training processes that are killed, cut off, filled up, spoiled and hung, and what must be true afterwards.

make faults                                every fault, a table at the end
python -m tests.faults.suite --only F1,F4  some of them

project.py     a tiny but real project, and what a finished run left behind, to compare two runs bit by bit
processes.py   starts, kills and starts again
driver.py      burnish's own command, with faults put in from outside at exact points
tries.py       what a try is and what it comes to
f*.py          the tries of each fault
"""
