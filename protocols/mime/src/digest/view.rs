//! Reading an archive.

use rkyv::util::AlignedVec;

use super::{
    ArchivedAddress, ArchivedDigest, ArchivedEnvelope, ArchivedParameter, ArchivedPart, ArchivedRun, ArchivedText,
    DigestError, NO_DATE, NOTHING, VERSION,
};
use crate::date::SentDate;

/// A checked archive, whole or reduced.
#[derive(Debug)]
pub struct DigestBytes(AlignedVec);

impl DigestBytes {
    /// Checks an archive read from storage, whatever its alignment there.
    ///
    /// # Errors
    /// The bytes are no archive, or one of another version.
    pub fn from_storage(bytes: &[u8]) -> Result<Self, DigestError> {
        let mut aligned = AlignedVec::with_capacity(bytes.len());
        aligned.extend_from_slice(bytes);
        Self::from_aligned(aligned)
    }

    /// Checks an archive that is aligned already.
    ///
    /// # Errors
    /// As [`DigestBytes::from_storage`].
    pub fn from_aligned(bytes: AlignedVec) -> Result<Self, DigestError> {
        let digest = rkyv::access::<ArchivedDigest, rkyv::rancor::Error>(&bytes).map_err(DigestError::Damaged)?;
        if digest.version != VERSION {
            return Err(DigestError::Version(digest.version));
        }
        Ok(Self(bytes))
    }

    /// The digest. Checks it once more, which takes less than a microsecond; no unsafe code has to trust the first check.
    pub fn digest(&self) -> Option<&ArchivedDigest> {
        rkyv::access::<ArchivedDigest, rkyv::rancor::Error>(&self.0).ok()
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl ArchivedDigest {
    /// The string, or nothing.
    pub fn text(&self, text: &ArchivedText) -> Option<&[u8]> {
        let (start, len) = (text.start.to_native() as usize, text.len.to_native());
        if len == NOTHING { None } else { Some(self.text.get(start..)?.get(..len as usize).unwrap_or_default()) }
    }

    /// The envelope of the message itself.
    pub fn envelope(&self) -> Option<&ArchivedEnvelope> {
        self.envelopes.first()
    }

    /// The envelope of the message in a message part.
    pub fn envelope_of(&self, part: &ArchivedPart) -> Option<&ArchivedEnvelope> {
        self.envelopes.get(part.envelope.to_native() as usize)
    }

    pub fn addresses(&self, run: &ArchivedRun) -> &[ArchivedAddress] {
        slice(&self.addresses, run)
    }

    pub fn parameters(&self, run: &ArchivedRun) -> &[ArchivedParameter] {
        slice(&self.parameters, run)
    }

    /// The Date field, if it can be read.
    pub fn sent_date(&self) -> Option<SentDate> {
        let unix_seconds = self.sent_unix_seconds.to_native();
        let date = SentDate { unix_seconds, local_day: self.sent_local_day.to_native() };
        (unix_seconds != NO_DATE).then_some(date)
    }

    pub fn preview(&self) -> &str {
        self.text(&self.preview).and_then(|bytes| std::str::from_utf8(bytes).ok()).unwrap_or_default()
    }

    /// All parts, parents first; the message is the first.
    pub fn parts(&self) -> &[ArchivedPart] {
        &self.parts
    }

    /// The indexes of the parts directly within a part.
    pub fn children(&self, index: usize) -> impl Iterator<Item = usize> + '_ {
        let end = self.parts.get(index).map_or(0, |part| part.subtree_end.to_native() as usize).min(self.parts.len());
        let mut next = index + 1;
        std::iter::from_fn(move || {
            let child = next;
            // In a damaged archive the end might not advance.
            next = self.parts.get(child)?.subtree_end.to_native() as usize;
            (child < end && next > child).then_some(child)
        })
    }

    /// The part that IMAP numbers name (RFC 3501, 6.4.5): empty for the message itself. A message that is no multipart has
    /// one part, 1, which is its body; and so has a message within.
    pub fn part(&self, numbers: &[u32]) -> Option<(usize, &ArchivedPart)> {
        let mut index = 0;
        for (depth, &number) in numbers.iter().enumerate() {
            let mut part = self.parts.get(index)?;
            // Numbers after a message part name the parts of the message inside.
            let enters_message = depth == 0 || part.is_message();
            if depth > 0 && part.is_message() {
                index = self.children(index).next()?;
                part = self.parts.get(index)?;
            }
            if part.is_multipart() {
                index = self.children(index).nth((number as usize).checked_sub(1)?)?;
            } else if !(enters_message && number == 1) {
                return None;
            }
        }
        Some((index, self.parts.get(index)?))
    }

    /// The multipart without parts whose part 1 the numbers name. A multipart has at least one part for IMAP (RFC 3501, 9:
    /// `body-type-mpart`): all its text stands for that.
    pub fn empty_multipart(&self, numbers: &[u32]) -> Option<&ArchivedPart> {
        let (1, within) = numbers.split_last()? else { return None };
        let (mut index, mut part) = self.part(within)?;
        if !within.is_empty() && part.is_message() {
            index += 1;
            part = self.parts.get(index)?;
        }
        (part.is_multipart() && self.children(index).next().is_none()).then_some(part)
    }

    /// For `numbers.HEADER`, `.TEXT` and `.HEADER.FIELDS`: the message in that part (RFC 3501, 6.4.5).
    pub fn message_in(&self, numbers: &[u32]) -> Option<&ArchivedPart> {
        if numbers.is_empty() {
            return self.parts.first();
        }
        let (index, part) = self.part(numbers)?;
        if part.is_message() { self.parts.get(index + 1) } else { None }
    }
}

fn slice<'a, T>(list: &'a [T], run: &ArchivedRun) -> &'a [T] {
    let (start, len) = (run.start.to_native() as usize, run.len.to_native() as usize);
    list.get(start..).and_then(|rest| rest.get(..len)).unwrap_or_default()
}

impl ArchivedPart {
    pub fn is_multipart(&self) -> bool {
        self.kind == 1
    }

    pub fn is_message(&self) -> bool {
        self.kind == 2
    }

    /// Where the header is in the raw message, its blank line included.
    pub fn header_range(&self) -> std::ops::Range<u64> {
        u64::from(self.header_offset.to_native())..u64::from(self.body_offset.to_native())
    }

    /// Where the body is in the raw message.
    pub fn body_range(&self) -> std::ops::Range<u64> {
        let start = u64::from(self.body_offset.to_native());
        start..start + u64::from(self.body_bytes.to_native())
    }
}
