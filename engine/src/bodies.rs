//! How bodies are stored: what base64 in them says is kept apart from the rest, and decoded.
//!
//! Of a body that lies in its message's record each text has a frame of its own there; of a larger one it has blocks of its
//! own, which other messages can name, too.

use std::cmp::Reverse;

use crate::format::base64_lines::{Base64Text, find};
use crate::format::dictionary::DictionaryKind;
use crate::format::frame::{BLOCK_RAW_BYTES, FrameInfo, Packer};
use crate::format::message::{BlockForm, Extent};

/// Shorter texts are left as they are: what many messages have of them - certificates, small pictures - the dictionary knows.
const TEXT_OCTETS_MIN: usize = 4 << 10;
/// The same where a body is larger than a block: each text costs a block, and so does what follows it.
const TEXT_OCTETS_MIN_IN_LARGE: usize = 32 << 10;
/// Such a body has a text for each so many octets, and [`TEXTS_MORE`], at most; of more of them the longest count. So the blocks of a message
/// are but a few times as many as those that it fills.
const OCTETS_PER_TEXT: usize = 128 << 10;
const TEXTS_MORE: usize = 16;

/// Packs a body, or the beginning of one, for its message's record: its frame, then those of contents. What the body's frame says,
/// and what the extents have to say of it.
pub(crate) fn pack_in_record(packer: &mut Packer, body: &[u8], frames: &mut Vec<u8>) -> (FrameInfo, Vec<Extent>) {
    let mut contents = Vec::new();
    for text in find(body, TEXT_OCTETS_MIN) {
        contents.extend(text.content(body).map(|content| (text, content)));
    }
    if contents.is_empty() {
        return (packer.pack_as(DictionaryKind::Body, body, frames), Vec::new());
    }
    let (mut literals, mut extents, mut at) = (Vec::new(), Vec::new(), 0);
    let mut literal = |octets: &[u8], extents: &mut Vec<Extent>| {
        if !octets.is_empty() {
            literals.extend_from_slice(octets);
            extents.push(Extent::Literal { octets: octets.len() as u64 });
        }
    };
    let mut packed = Vec::new();
    for (text, content) in &contents {
        literal(&body[at..text.start], &mut extents);
        let frame = packer.pack(content, &mut packed);
        extents.push(Extent::Base64 { octets: text.octets as u32, line_octets: text.line_octets as u16, frame });
        at = text.end();
    }
    literal(&body[at..], &mut extents);
    let info = match &literals[..] {
        [] => FrameInfo::NONE,
        literals => packer.pack_as(DictionaryKind::Body, literals, frames),
    };
    frames.append(&mut packed);
    (info, extents)
}

/// A body without its base64.
pub(crate) fn without_base64(body: &[u8]) -> Vec<u8> {
    let (mut literals, mut at) = (Vec::new(), 0);
    for text in find(body, TEXT_OCTETS_MIN) {
        literals.extend_from_slice(&body[at..text.start]);
        at = text.end();
    }
    literals.extend_from_slice(&body[at..]);
    literals
}

/// A body that does not lie in its message's record, or not all of it.
pub(crate) struct Cut<'a> {
    body: &'a [u8],
    texts: Vec<Base64Text>,
    /// Where the blocks begin.
    first: usize,
}

/// A part of a body that becomes a block.
pub(crate) enum Piece<'a> {
    AsItIs(&'a [u8]),
    /// What base64 says.
    Content(Vec<u8>),
}

impl<'a> Cut<'a> {
    /// Cuts a body at the base64 in it, but for what comes before that, if there is room for it in the record.
    pub(crate) fn at_base64(body: &'a [u8]) -> Self {
        let is_large = body.len() > BLOCK_RAW_BYTES;
        let mut texts = find(body, if is_large { TEXT_OCTETS_MIN_IN_LARGE } else { TEXT_OCTETS_MIN });
        let most = body.len() / OCTETS_PER_TEXT + TEXTS_MORE;
        if is_large && texts.len() > most {
            texts.sort_by_key(|text| Reverse(text.octets));
            texts.truncate(most);
            texts.sort_by_key(|text| text.start);
        }
        let first = texts.first().map_or(0, |text| text.start);
        Self { body, texts, first: if first > BLOCK_RAW_BYTES { 0 } else { first } }
    }

    /// Cuts a body wherever a block is full. The record has none of it: this is for one that begins with a part of the header,
    /// whose readers look for that in the blocks.
    pub(crate) fn anywhere(body: &'a [u8]) -> Self {
        Self { body, texts: Vec::new(), first: 0 }
    }

    pub(crate) fn has_base64(&self) -> bool {
        !self.texts.is_empty()
    }

    /// What is to lie in the record.
    pub(crate) fn in_record(&self) -> &'a [u8] {
        &self.body[..self.first]
    }

    /// Hands out the rest, one piece after another.
    pub(crate) fn each_piece(&self, mut take: impl FnMut(Piece<'a>, BlockForm)) {
        let as_it_is = |octets: &'a [u8], take: &mut dyn FnMut(Piece<'a>, BlockForm)| {
            for chunk in octets.chunks(BLOCK_RAW_BYTES) {
                take(Piece::AsItIs(chunk), BlockForm::as_it_is(chunk.len() as u32));
            }
        };
        let mut at = self.first;
        for text in self.texts.iter().flat_map(|text| text.parts()) {
            let Some(content) = text.content(self.body) else { continue };
            as_it_is(&self.body[at..text.start], &mut take);
            let form = BlockForm { octets: text.octets as u32, line_octets: text.line_octets as u16 };
            take(Piece::Content(content), form);
            at = text.end();
        }
        as_it_is(&self.body[at..], &mut take);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::base64_lines::put_lines;

    /// How many pieces a body is cut into, that it comes back from.
    fn pieces_of(body: &[u8]) -> usize {
        let cut = Cut::at_base64(body);
        let (mut back, mut pieces) = (cut.in_record().to_vec(), 0);
        cut.each_piece(|piece, form| {
            pieces += 1;
            match piece {
                Piece::AsItIs(octets) => back.extend_from_slice(octets),
                Piece::Content(content) => {
                    put_lines(&content, form.line_octets.into(), form.octets as usize, &mut back);
                }
            }
        });
        assert!(back == body);
        pieces
    }

    fn runs(octets: usize, of_content: usize) -> Vec<u8> {
        let mut run = Vec::new();
        put_lines(&vec![7; of_content], 76, usize::MAX, &mut run);
        run.extend_from_slice(b"-\r\n");
        run.repeat(octets / run.len())
    }

    #[test]
    fn a_body_of_many_texts_has_few_pieces() {
        // Short ones stay where they are, whatever their number; of longer ones so many count.
        for of_content in [3100, 20_000, 25_000, 40_000] {
            let body = runs(8 << 20, of_content);
            let (pieces, filled) = (pieces_of(&body), body.len() / BLOCK_RAW_BYTES);
            let most = if of_content < 24_000 { filled + 1 } else { 8 * filled + 2 * TEXTS_MORE };
            assert!(pieces <= most, "{pieces} pieces of texts of {of_content} octets, {filled} filled");
        }
        let mut body = runs(8 << 20, 25_000);
        put_lines(&[8; 100_000], 76, usize::MAX, &mut body);
        let last = Cut::at_base64(&body).texts.last().copied();
        assert!(last.is_some_and(|text| text.octets > 100_000), "the longest are those that count");
        // What mail looks like: all of them.
        assert_eq!(pieces_of(&runs(20 * 60_000, 40_000)), 2 * 21);
        assert_eq!(Cut::at_base64(&runs(200_000, 3100)).texts.len(), 200_000 / 4245);
    }
}
