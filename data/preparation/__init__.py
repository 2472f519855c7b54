"""The stages between documents and shards, in the order in which a document passes them.

    download            a data set of the Hub, to local files
    read_pieces         one piece of a source: its rows normalised (clean), judged by language and quality (filters),
                        held against the questions of evaluation sets (contamination), and hashed
    select_documents    which of them stay: no duplicate, no near-duplicate (near_duplicates), and on which side
    write_tokens        the tokens of a piece
    documents           puts these together for one source, and goes on after a kill

Pieces are read and tokenised by any number of processes at once (workers). `words` says what a word is, `interruption`
what a request to stop does. `data/prepare.py` is the entry.
"""
