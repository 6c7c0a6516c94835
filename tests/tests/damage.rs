//! Damages every field that `docs/format.md` lists, in a real store, and expects the check to name it, and the store to
//! open or refuse without a crash.

use std::collections::BTreeMap;

use posthaste_tests::damage::{Damage, Layout, Structure, layout, store_with_everything};

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
                    let found = store.check_with_damage(&file, Damage::Flip(start + at));
                    assert!(!found.is_empty(), "{structure}, {field}: byte {at} of the one in {file} at {start}");
                    store.open_with_damage(&file, Damage::Flip(start + at), &found);
                    let found = store.scrub_with_damage(&file, Damage::Flip(start + at));
                    assert!(!found.is_empty(), "{structure}, {field}: the scrub passes byte {at} of {file} at {start}");
                }
                // What is done about it depends on where it is, and hardly on which byte it is.
                store.mend_with_damage(&file, Damage::Flip(start + offset));
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
            let found = store.check_with_damage(&file, Damage::Flip(payload + at));
            assert!(!found.is_empty(), "kind {kind}: byte {at} of the payload in {file} at {payload}");
            if let Some(mailbox) = mailbox {
                let named = found.iter().any(|finding| finding.touches.iter().any(|touch| touch.0 == mailbox));
                assert!(named, "kind {kind} in {file} at {payload}: no finding names mailbox {mailbox}: {found:?}");
            }
            store.open_with_damage(&file, Damage::Flip(payload + at), &found);
            let found = store.scrub_with_damage(&file, Damage::Flip(payload + at));
            assert!(!found.is_empty(), "kind {kind}: the scrub passes byte {at} of the payload in {file} at {payload}");
        }
        store.mend_with_damage(&file, Damage::Flip(payload + len / 2));
        *kinds.entry(kind).or_insert(0) += 1;
    }
    println!("payloads damaged, by kind: {kinds:?}");
    assert!(kinds.len() >= 10, "the test store has only kinds {kinds:?}");
}

/// `POSTHASTE_DAMAGES` says how many.
#[test]
fn random_damage_is_found_and_crashes_nothing() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let seed = number("POSTHASTE_SEED").unwrap_or(1);
    let count = number("POSTHASTE_DAMAGES").unwrap_or(300);
    println!("seed {seed}, {count} damages");
    let store = store_with_everything(9);
    let unused = store.unchecked_bytes();
    for (file, damage) in store.random_damages(seed, count as usize) {
        let found = store.check_with_damage(&file, damage);
        if found.is_empty() {
            assert!(unused.contains(&file, damage), "seed {seed}: nobody noticed {damage:?} of {file}");
        }
        store.open_with_damage(&file, damage, &found);
        store.mend_with_damage(&file, damage);
        let scrubbed = store.scrub_with_damage(&file, damage);
        if scrubbed.is_empty() {
            assert!(unused.contains(&file, damage), "seed {seed}: the scrub passes {damage:?} of {file}");
        } else if !file.contains("/wal/") {
            // What is unused in a segment that is being written has a footer once that is sealed.
            assert!(!found.is_empty(), "seed {seed}: {damage:?} of {file} has no meaning: {scrubbed:?}");
        }
    }
}
