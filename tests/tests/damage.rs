//! Damages every field that `docs/format.md` lists, in a real store, and expects the check to name it, and the store to
//! open or refuse without a crash.

use std::collections::BTreeMap;

use posthaste_tests::damage::{Layout, Structure, layout, store_with_everything};

#[test]
fn every_field_of_the_format_is_checked() {
    let document = include_str!("../../docs/format.md");
    let layouts = layout(document);
    let wanted: Vec<&str> = layouts.iter().map(|layout| layout.structure.as_str()).collect();
    let store = store_with_everything(7);
    let mut tested: BTreeMap<&str, usize> = BTreeMap::new();
    for Layout { structure, fields } in &layouts {
        let places = store.places(Structure::named(structure).unwrap_or_else(|| {
            panic!("format.md has a table for {structure:?}, and this test does not know where to find one")
        }));
        assert!(!places.is_empty(), "the test store has no {structure}");
        for (file, start) in places {
            for (offset, bytes, field) in fields {
                for at in [*offset, offset + bytes - 1] {
                    let found = store.check_with_damage(&file, start + at);
                    assert!(!found.is_empty(), "{structure}, {field}: byte {at} of the one in {file} at {start}");
                    store.open_with_damage(&file, start + at, &found);
                    let found = store.scrub_with_damage(&file, start + at);
                    assert!(!found.is_empty(), "{structure}, {field}: the scrub passes byte {at} of {file} at {start}");
                }
                *tested.entry(structure).or_default() += 1;
            }
        }
    }
    assert!(wanted.len() >= 13, "format.md has lost tables: {wanted:?}");
    println!("fields damaged: {tested:?}");
}

#[test]
fn payloads_of_every_kind_are_checked_and_name_whom_they_touch() {
    let store = store_with_everything(8);
    let mut kinds = BTreeMap::new();
    for (file, payload, len, kind, mailbox) in store.payloads() {
        for at in [0, len / 2, len - 1] {
            let found = store.check_with_damage(&file, payload + at);
            assert!(!found.is_empty(), "kind {kind}: byte {at} of the payload in {file} at {payload}");
            if let Some(mailbox) = mailbox {
                let named = found.iter().any(|finding| finding.touches.iter().any(|touch| touch.0 == mailbox));
                assert!(named, "kind {kind} in {file} at {payload}: no finding names mailbox {mailbox}: {found:?}");
            }
            store.open_with_damage(&file, payload + at, &found);
            let found = store.scrub_with_damage(&file, payload + at);
            assert!(!found.is_empty(), "kind {kind}: the scrub passes byte {at} of the payload in {file} at {payload}");
        }
        *kinds.entry(kind).or_insert(0) += 1;
    }
    println!("payloads damaged, by kind: {kinds:?}");
    assert!(kinds.len() >= 10, "the test store has only kinds {kinds:?}");
}

#[test]
fn random_damage_is_found_and_crashes_nothing() {
    let seed = std::env::var("POSTHASTE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("seed {seed}");
    let store = store_with_everything(9);
    let unused = store.unchecked_bytes();
    for (file, offset) in store.random_places(seed, 300) {
        let found = store.check_with_damage(&file, offset);
        if found.is_empty() {
            assert!(unused.contains(&file, offset), "seed {seed}: nobody noticed byte {offset} of {file}");
        }
        store.open_with_damage(&file, offset, &found);
        let scrubbed = store.scrub_with_damage(&file, offset);
        if scrubbed.is_empty() {
            assert!(unused.contains(&file, offset), "seed {seed}: the scrub passes byte {offset} of {file}");
        } else {
            assert!(!found.is_empty(), "seed {seed}: byte {offset} of {file} has no meaning: {scrubbed:?}");
        }
    }
}
