"""TokenFlow's tokenizers to `NextFlowVQModel` and back.

    python conversion/convert_tokenflow.py tokenflow_siglip_32k.pt FOLDER
    python conversion/convert_tokenflow.py tokenflow_clipb_32k_enhanced.pt FOLDER --interpolate
    python conversion/convert_tokenflow.py FOLDER FILE.pt --back

The key table and the checks are in `transformers_nextflow.conversion_tokenflow`.
"""

import argparse

from transformers_nextflow.conversion_tokenflow import convert_tokenflow, export_tokenflow


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a released file, or with --back a folder of NextFlowVQModel")
    parser.add_argument("target", help="the folder, or with --back the file, to write")
    parser.add_argument("--back", action="store_true", help="from NextFlowVQModel to TokenFlow's layout")
    parser.add_argument("--interpolate", action="store_true", help="clipb: pictures of 256 pixels in place of 224")
    parser.add_argument("--semantic-heads", type=int, help="heads of the semantic encoder; default the release's")
    parser.add_argument("--semantic-decoder-heads", type=int, help="heads of the semantic decoder; default 12")
    parser.add_argument("--base-model", help="repository of the source, for the model card")
    arguments = vars(parser.parse_args())
    source, target, back = (arguments.pop(name) for name in ("source", "target", "back"))
    if back:
        export_tokenflow(source, target)
    else:
        convert_tokenflow(source, target, **arguments)
    print(f"wrote {target}; read back, all tensors equal")


if __name__ == "__main__":
    main()
