"""The main job in a page: compare two shipped models and ask a question of the tables.

python examples/quickstart.py
"""

import tvlens as tv


def main() -> None:
    """Print where the report is, the heads that changed and whether size predicts effect."""
    pair = tv.load_pair("demo:base", "demo:med")
    print(pair.load_report.counts)

    study = pair.compare(tv.prompts("demo:med"), metric="logprob", progress=print)
    print(study.folder / "report.html")

    heads = study.joined(part="W_O").query("kind == 'head'")
    print(heads.nlargest(5, "relative_delta")[["component", "relative_delta", "gain", "score"]])

    sizes, effects = heads["relative_delta"], heads["score"].abs()
    print(
        f"size against effect, Spearman: {sizes.corr(effects, 'spearman'):+.2f} over {len(heads)}"
    )


if __name__ == "__main__":
    main()
