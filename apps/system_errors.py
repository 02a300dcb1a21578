"""What the machine refuses, in one line with a remedy. Imports nothing heavy: the command line ends in it."""

import errno

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there, or choose another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "let more files be open: ulimit -n 4096"),
}


def refusal(error: OSError) -> str:
    """The file, what is wrong with it, and what can be done."""
    told = error.strerror or str(error) or type(error).__name__
    told = f"{error.filename}: {told}" if error.filename is not None else told
    remedy = REMEDIES.get(error.errno or 0)
    return f"{told}; {remedy}" if remedy else told
