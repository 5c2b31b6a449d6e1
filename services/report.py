def write_report(d):
    return d
