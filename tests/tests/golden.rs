//! Stores of every format version stay readable, and what is wrong with damaged ones is said in exact words.

use std::collections::BTreeMap;
use std::path::Path;

use posthaste_tests::damage::{dump, report_of};

fn files_below(root: &Path, directory: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(directory).expect("the golden store is in the repository") {
        let path = entry.expect("a readable directory").path();
        if path.is_dir() {
            files_below(root, &path, files);
        } else if !path.ends_with("expected.txt") {
            let name = path.strip_prefix(root).ok().and_then(Path::to_str).expect("names below the root are ASCII");
            files.insert(name.to_owned(), std::fs::read(&path).expect("a readable file"));
        }
    }
}

fn golden(version: &str) -> (BTreeMap<String, Vec<u8>>, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(version);
    let mut files = BTreeMap::new();
    files_below(&root, &root, &mut files);
    (files, std::fs::read_to_string(root.join("expected.txt")).expect("its text is beside it"))
}

#[test]
fn the_store_of_version_1_shows_what_it_always_showed() {
    // The first was written before there were dictionaries, the second before there was compaction, the third when only
    // compaction decoded attachments, the fourth when pages had messages by rows.
    for version in ["v1", "v1-dictionaries", "v1-compacted", "v1-attachments", "v1-columns"] {
        let (files, expected) = golden(version);
        assert_eq!(dump(&files).unwrap(), expected, "{version}");
        assert_eq!(report_of(&files), "", "{version}");
    }
}

/// Replaces bytes of a file of the golden store.
fn with(file: &str, offset: usize, bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let (mut files, _) = golden("v1");
    let content = files.get_mut(file).unwrap_or_else(|| panic!("no file {file}"));
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
    files
}

#[test]
fn damaged_stores_give_exact_errors() {
    let segment = "shard-0000/seg/0000000001-00000001";
    let manifest = golden("v1").0.into_keys().rfind(|file| file.contains("/manifest/")).unwrap();
    let cases: Vec<(BTreeMap<String, Vec<u8>>, String)> = vec![
        (with("store", 0, b"XX"), "damage in store: no store file here: wrong magic number".to_owned()),
        (
            with("store", 8, &[9]),
            "damage in store: the store file has format version 9; this program reads version 1: use a newer program"
                .to_owned(),
        ),
        (
            with("store", 32, &[7]),
            "damage in store: checksum of the store file is dead7e01, expected fbc621dd".to_owned(),
        ),
        (
            with(&manifest, 8, &[2]),
            "damage in shard-0000/manifest: the manifest has format version 2; this program reads version 1: \
             use a newer program"
                .to_owned(),
        ),
        (with(segment, 0, b"NOSEGMNT"), format!("{segment} at offset 0: no segment header here: wrong magic number")),
        (with(segment, 4096, b"nope"), format!("{segment} at offset 4096: no batch header here: wrong magic number")),
    ];
    for (files, expected) in cases {
        assert_eq!(report_of(&files).lines().next(), Some(expected.as_str()));
    }
}

#[test]
fn an_unknown_optional_record_is_skipped_and_an_unknown_mandatory_one_refused() {
    use posthaste_engine::format::FormatError;
    use posthaste_engine::format::record::{OPTIONAL, Record};
    assert_eq!(Record::decode(OPTIONAL | 999, b"anything"), Ok(None));
    assert_eq!(Record::decode(999, b"anything"), Err(FormatError::UnknownRecord { kind: 999 }));
}
