//! The messages of one mailbox in memory, ascending by UID, each in some 20 bytes.
//!
//! They lie in blocks of up to [`BLOCK_ROWS`], column by column, each column as its least value and what exceeds it, in as
//! many bytes as the largest excess of the block needs. New messages wait unpacked until they fill a block. Index pages have the
//! same blocks (`docs/format.md`), so that those of a large mailbox are there as soon as they are read.

use roaring::RoaringBitmap;
use roaring::bitmap::Iter;

use crate::format::codec::{DecodeError, Input, Wire};
use crate::ids::{Location, Lsn, MessageId, ModSeq, SegmentId, ShardId, Uid};
use crate::index::{Message, Moved};
use crate::numbering::Numbering;

const BLOCK_ROWS: usize = 128;
/// Blocks with fewer are put together where they are written to a page.
const BLOCK_ROWS_KEPT: usize = 96;
const COLUMNS: usize = 14;
/// The first column, whose least value is that of the first row.
const UID: usize = 0;
const SIZE: usize = 10;
/// The last column, so that a block in which all have the same is cut off before it.
const MODSEQ: usize = COLUMNS - 1;
/// Of each column: its least value, and how many bytes an excess takes.
const COLUMN_HEADER_BYTES: usize = 9;
const HEADERS_BYTES: usize = COLUMNS * COLUMN_HEADER_BYTES;
/// An excess is read and written as eight bytes, of which the upper ones may be another's.
const PADDING_BYTES: usize = 8;

type Row = [u64; COLUMNS];

fn row_of(message: &Message) -> Row {
    [
        message.uid.0.into(),
        message.prefix_of.into(),
        (message.zone_minutes as u16).into(),
        message.id.origin.0.into(),
        message.id.lsn.0,
        message.location.segment.0.into(),
        message.location.offset_units.into(),
        message.location.len.into(),
        message.location.ordinal.into(),
        message.head_bytes.into(),
        message.size,
        message.internal_date as u64,
        message.save_date as u64,
        message.modseq.0,
    ]
}

fn message_of(row: Row) -> Message {
    let [
        uid,
        prefix_of,
        zone,
        origin,
        lsn,
        segment,
        offset_units,
        len,
        ordinal,
        head_bytes,
        size,
        received,
        saved,
        modseq,
    ] = row;
    Message {
        uid: Uid(uid as u32),
        prefix_of: prefix_of as u16,
        zone_minutes: zone as u16 as i16,
        modseq: ModSeq(modseq),
        id: MessageId { origin: ShardId(origin as u32), lsn: Lsn(lsn) },
        location: Location {
            segment: SegmentId(segment as u32),
            offset_units: offset_units as u32,
            len: len as u32,
            ordinal: ordinal as u32,
        },
        head_bytes: head_bytes as u32,
        size,
        internal_date: received as i64,
        save_date: saved as i64,
    }
}

#[derive(Clone, Debug)]
struct Block {
    rows: u32,
    /// The UIDs of its ends, so that who looks for one reads no more of other blocks.
    first: u32,
    last: u32,
    /// The headers of all columns, then their excesses, then padding.
    bytes: Box<[u8]>,
}

impl Block {
    fn pack(rows: &[Row]) -> Self {
        assert!((1..=BLOCK_ROWS).contains(&rows.len()), "a block of {} messages", rows.len());
        let (mut least, mut most) = (rows[0], rows[0]);
        for row in rows {
            for column in 0..COLUMNS {
                least[column] = least[column].min(row[column]);
                most[column] = most[column].max(row[column]);
            }
        }
        let width = |column: usize| width_of(most[column] - least[column]);
        let excesses_bytes = (0..COLUMNS).map(width).sum::<usize>() * rows.len();
        let mut bytes = vec![0; HEADERS_BYTES + excesses_bytes + PADDING_BYTES];
        let mut at = HEADERS_BYTES;
        for (column, &least) in least.iter().enumerate() {
            let width = width(column);
            let header = &mut bytes[column * COLUMN_HEADER_BYTES..][..COLUMN_HEADER_BYTES];
            header[..8].copy_from_slice(&least.to_le_bytes());
            header[8] = width as u8;
            if width > 0 {
                for row in rows {
                    // The next value overwrites what is too much.
                    bytes[at..at + 8].copy_from_slice(&(row[column] - least).to_le_bytes());
                    at += width;
                }
            }
        }
        let (first, last) = (rows[0][UID] as u32, rows[rows.len() - 1][UID] as u32);
        Self { rows: rows.len() as u32, first, last, bytes: bytes.into() }
    }

    /// Appends it as a page has it.
    fn put(&self, out: &mut Vec<u8>) {
        out.push(self.rows as u8);
        out.extend_from_slice(&self.bytes[..self.bytes.len() - PADDING_BYTES]);
    }

    /// Takes one out of a page, whose UIDs are above `after`.
    fn take(input: &mut Input<'_>, after: Option<u32>) -> Result<Self, DecodeError> {
        let rows = u8::take(input)?;
        if !(1..=BLOCK_ROWS as u8).contains(&rows) {
            return Err(DecodeError::Value { field: "messages of a block", value: rows.into() });
        }
        let mut row_bytes = 0;
        for column in Input(input.0).bytes(HEADERS_BYTES)?.chunks(COLUMN_HEADER_BYTES) {
            let width = column[COLUMN_HEADER_BYTES - 1];
            if width > 8 {
                return Err(DecodeError::Value { field: "bytes of a column", value: width.into() });
            }
            row_bytes += usize::from(width);
        }
        let stored = input.bytes(HEADERS_BYTES + row_bytes * usize::from(rows))?;
        let mut bytes = Vec::with_capacity(stored.len() + PADDING_BYTES);
        bytes.extend_from_slice(stored);
        bytes.extend_from_slice(&[0; PADDING_BYTES]);
        let mut block = Self { rows: rows.into(), first: 0, last: 0, bytes: bytes.into() };
        let mut highest = after.map(u64::from);
        for uid in block.column(UID) {
            if highest.is_some_and(|highest| uid <= highest) || uid > u32::MAX.into() {
                return Err(DecodeError::Value { field: "UID", value: uid });
            }
            highest = Some(uid);
        }
        let least = block.word(UID * COLUMN_HEADER_BYTES);
        block.first = block.value(UID, HEADERS_BYTES, 0) as u32;
        block.last = highest.unwrap_or_default() as u32;
        if least != u64::from(block.first) {
            return Err(DecodeError::Value { field: "least UID", value: least });
        }
        Ok(block)
    }

    fn rows(&self) -> usize {
        self.rows as usize
    }

    /// Whether there is no gap between its UIDs.
    fn is_dense(&self) -> bool {
        self.last - self.first == self.rows - 1
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn width(&self, column: usize) -> usize {
        self.bytes[column * COLUMN_HEADER_BYTES + 8].into()
    }

    /// A value of a column whose excesses begin at `start`.
    fn value(&self, column: usize, start: usize, number: usize) -> u64 {
        let least = self.word(column * COLUMN_HEADER_BYTES);
        match self.width(column) {
            0 => least,
            // A page may have been forged so that it exceeds the column.
            width => least.wrapping_add(self.word(start + number * width) & (u64::MAX >> (64 - 8 * width))),
        }
    }

    /// Where the excesses of a column begin.
    fn start(&self, column: usize) -> usize {
        let before: usize = (0..column).map(|column| self.width(column)).sum();
        HEADERS_BYTES + before * self.rows()
    }

    /// All values of a column.
    fn column(&self, column: usize) -> impl Iterator<Item = u64> + '_ {
        let least = self.word(column * COLUMN_HEADER_BYTES);
        let (start, width) = (self.start(column), self.width(column));
        let mask = u64::MAX.checked_shr(64 - 8 * width as u32).unwrap_or(0);
        let excesses = &self.bytes[start..start + width * self.rows() + PADDING_BYTES];
        (0..self.rows()).map(move |number| {
            let excess = &excesses[number * width..][..8];
            least.wrapping_add(u64::from_le_bytes(excess.try_into().expect("eight bytes")) & mask)
        })
    }

    fn modseqs_start(&self) -> usize {
        self.bytes.len() - PADDING_BYTES - self.width(MODSEQ) * self.rows()
    }

    fn uid(&self, number: usize) -> u32 {
        if self.is_dense() { self.first + number as u32 } else { self.value(UID, HEADERS_BYTES, number) as u32 }
    }

    fn uids(&self) -> impl Iterator<Item = u32> + '_ {
        self.column(UID).map(|uid| uid as u32)
    }

    fn modseq(&self, number: usize) -> ModSeq {
        ModSeq(self.value(MODSEQ, self.modseqs_start(), number))
    }

    fn size(&self, number: usize) -> u64 {
        self.value(SIZE, self.start(SIZE), number)
    }

    fn row(&self, number: usize) -> Row {
        let mut start = HEADERS_BYTES;
        std::array::from_fn(|column| {
            let value = self.value(column, start, number);
            start += self.width(column) * self.rows();
            value
        })
    }

    fn unpack(&self) -> Vec<Row> {
        (0..self.rows()).map(|number| self.row(number)).collect()
    }

    fn set_modseq(&mut self, modseq: ModSeq) {
        if self.width(MODSEQ) > 0 {
            let mut bytes = self.bytes[..self.modseqs_start() + PADDING_BYTES].to_vec();
            bytes[MODSEQ * COLUMN_HEADER_BYTES + 8] = 0;
            self.bytes = bytes.into();
        }
        self.bytes[MODSEQ * COLUMN_HEADER_BYTES..][..8].copy_from_slice(&modseq.0.to_le_bytes());
    }

    /// Gives each row a mod-sequence of its own. The column is the last one, so that the others stay where they are.
    fn set_modseqs(&mut self, modseqs: &[u64]) {
        let (Some(&least), Some(&most)) = (modseqs.iter().min(), modseqs.iter().max()) else { return };
        let (start, width) = (self.modseqs_start(), width_of(most - least));
        let mut bytes = Vec::with_capacity(start + width * modseqs.len() + PADDING_BYTES);
        bytes.extend_from_slice(&self.bytes[..start]);
        let header = &mut bytes[MODSEQ * COLUMN_HEADER_BYTES..][..COLUMN_HEADER_BYTES];
        header[..8].copy_from_slice(&least.to_le_bytes());
        header[8] = width as u8;
        modseqs.iter().for_each(|modseq| bytes.extend_from_slice(&(modseq - least).to_le_bytes()[..width]));
        bytes.extend_from_slice(&[0; PADDING_BYTES]);
        self.bytes = bytes.into();
    }

    /// Keeps the rows of these numbers alone, which ascend. It does so in place: no column gets wider, and all but that of the UIDs
    /// keep their least values, so that each value moves to where it or one before it was.
    fn keep(&mut self, numbers: &[u8]) {
        let mut uids = [0; BLOCK_ROWS];
        numbers.iter().zip(&mut uids).for_each(|(&number, uid)| *uid = self.uid(number.into()));
        let uids = &uids[..numbers.len()];
        let (first, last) = (uids[0], uids[uids.len() - 1]);
        let widths: [usize; COLUMNS] = std::array::from_fn(|column| self.width(column));
        let mut bytes = std::mem::take(&mut self.bytes).into_vec();
        let (mut start, mut at) = (HEADERS_BYTES + widths[UID] * self.rows(), HEADERS_BYTES);
        let uid_width = width_of((last - first).into());
        let header = &mut bytes[UID * COLUMN_HEADER_BYTES..][..COLUMN_HEADER_BYTES];
        header[..8].copy_from_slice(&u64::from(first).to_le_bytes());
        header[8] = uid_width as u8;
        for uid in uids {
            bytes[at..at + uid_width].copy_from_slice(&(uid - first).to_le_bytes()[..uid_width]);
            at += uid_width;
        }
        for width in &widths[UID + 1..] {
            match width {
                0 => {}
                1 => gather::<1>(&mut bytes, start, at, numbers),
                2 => gather::<2>(&mut bytes, start, at, numbers),
                3 => gather::<3>(&mut bytes, start, at, numbers),
                4 => gather::<4>(&mut bytes, start, at, numbers),
                5 => gather::<5>(&mut bytes, start, at, numbers),
                6 => gather::<6>(&mut bytes, start, at, numbers),
                7 => gather::<7>(&mut bytes, start, at, numbers),
                _ => gather::<8>(&mut bytes, start, at, numbers),
            }
            start += width * self.rows();
            at += width * numbers.len();
        }
        bytes.truncate(at);
        bytes.extend_from_slice(&[0; PADDING_BYTES]);
        *self = Self { rows: numbers.len() as u32, first, last, bytes: bytes.into() };
    }

    /// Takes away the UIDs from `next` on that there are. `next` is moved past the block. Whether anything is left.
    fn remove(&mut self, next: &mut Option<u32>, ascending: &mut Iter<'_>) -> bool {
        let (mut numbers, mut left) = ([0; BLOCK_ROWS], 0);
        for (number, uid) in (0_u8..).zip(self.uids()) {
            while next.is_some_and(|next| next < uid) {
                *next = ascending.next();
            }
            if *next != Some(uid) {
                numbers[left] = number;
                left += 1;
            }
        }
        if (1..self.rows()).contains(&left) {
            self.keep(&numbers[..left]);
        }
        left > 0
    }
}

/// Moves the values of these numbers, of those from `start` on, to `at` and behind it, which is not after `start`.
fn gather<const WIDTH: usize>(bytes: &mut [u8], start: usize, at: usize, numbers: &[u8]) {
    for (new, &old) in numbers.iter().enumerate() {
        let from = start + usize::from(old) * WIDTH;
        bytes.copy_within(from..from + WIDTH, at + new * WIDTH);
    }
}

/// How many bytes an excess takes.
fn width_of(excess: u64) -> usize {
    (u64::BITS - excess.leading_zeros()).div_ceil(8) as usize
}

/// Both ascend by UID.
fn relocate_rows(rows: &mut [Row], moved: &[Moved]) {
    for moved in moved {
        let Ok(at) = rows.binary_search_by_key(&u64::from(moved.uid.0), |row| row[UID]) else { continue };
        let mut message = message_of(rows[at]);
        let from = (message.location.segment, message.location.offset_units);
        if from == (moved.from, moved.from_units) {
            message.location = moved.to;
            message.head_bytes = moved.head_bytes;
            rows[at] = row_of(&message);
        }
    }
}

/// The messages of a mailbox.
#[derive(Clone, Debug, Default)]
pub struct Messages {
    blocks: Vec<Block>,
    /// The position of each block's first message.
    starts: Vec<u32>,
    /// What comes after the blocks.
    open: Vec<Row>,
}

impl Messages {
    pub fn len(&self) -> usize {
        self.open_start() + self.open.len()
    }

    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.open.is_empty()
    }

    /// Where the open ones begin.
    fn open_start(&self) -> usize {
        self.blocks.last().zip(self.starts.last()).map_or(0, |(block, &start)| start as usize + block.rows())
    }

    /// The block that has a position before the open ones, and the number in it.
    fn place(&self, at: usize) -> (usize, usize) {
        let block = self.starts.partition_point(|&start| start as usize <= at) - 1;
        (block, at - self.starts[block] as usize)
    }

    /// # Panics
    /// If there are no more than `at`.
    pub fn get(&self, at: usize) -> Message {
        match at.checked_sub(self.open_start()) {
            Some(number) => message_of(self.open[number]),
            None => {
                let (block, number) = self.place(at);
                message_of(self.blocks[block].row(number))
            }
        }
    }

    /// What `packed` and `open` make of each message from a position on.
    fn each_from<'a, T: 'a>(
        &'a self,
        at: usize,
        packed: impl Fn(&'a Block, usize) -> T + Copy + 'a,
        open: impl Fn(&'a Row) -> T + 'a,
    ) -> impl Iterator<Item = T> + 'a {
        let open_start = self.open_start();
        let (first, skipped) = if at < open_start { self.place(at) } else { (self.blocks.len(), 0) };
        let blocks = self.blocks[first..].iter().enumerate().flat_map(move |(later, block)| {
            let from = if later == 0 { skipped } else { 0 };
            (from..block.rows()).map(move |number| packed(block, number))
        });
        let from = at.saturating_sub(open_start).min(self.open.len());
        blocks.chain(self.open[from..].iter().map(open))
    }

    pub fn iter(&self) -> impl Iterator<Item = Message> + '_ {
        self.iter_from(0)
    }

    /// The messages from a position on.
    pub fn iter_from(&self, at: usize) -> impl Iterator<Item = Message> + '_ {
        self.each_from(at, |block, number| message_of(block.row(number)), |&row| message_of(row))
    }

    /// The UIDs from a position on.
    pub fn uids_from(&self, at: usize) -> impl Iterator<Item = u32> + '_ {
        self.each_from(at, Block::uid, |row| row[UID] as u32)
    }

    pub fn uids(&self) -> impl Iterator<Item = u32> + '_ {
        self.uids_from(0)
    }

    /// The UIDs with their mod-sequences from a position on.
    pub fn uids_and_modseqs_from(&self, at: usize) -> impl Iterator<Item = (u32, ModSeq)> + '_ {
        let packed = |block: &Block, number| (block.uid(number), block.modseq(number));
        self.each_from(at, packed, |row| (row[UID] as u32, ModSeq(row[MODSEQ])))
    }

    /// The UIDs of the messages before a position whose mod-sequence is after `since`, and is not `but`, with it.
    pub fn modified(
        &self,
        before: usize,
        since: ModSeq,
        but: Option<ModSeq>,
    ) -> impl Iterator<Item = (u32, ModSeq)> + '_ {
        let is_wanted = move |modseq: ModSeq| modseq > since && Some(modseq) != but;
        let blocks = self.blocks.iter().zip(&self.starts).take_while(move |&(_, &start)| (start as usize) < before);
        // A change of all messages leaves blocks that need one look each.
        let blocks = blocks.filter(move |(block, _)| block.width(MODSEQ) > 0 || is_wanted(block.modseq(0)));
        let packed = blocks.flat_map(move |(block, &start)| {
            let rows = block.rows().min(before - start as usize);
            (0..rows).map(|number| (block.uid(number), block.modseq(number)))
        });
        let open = self.open.iter().take(before.saturating_sub(self.open_start()));
        packed
            .chain(open.map(|row| (row[UID] as u32, ModSeq(row[MODSEQ]))))
            .filter(move |&(_, modseq)| is_wanted(modseq))
    }

    /// Calls `visit` with both ends of each run of UIDs without a gap from `first` to `last`, ascending, each as long as can be.
    pub fn visit_runs(&self, first: u32, last: u32, mut visit: impl FnMut(u32, u32)) {
        let mut run: Option<(u32, u32)> = None;
        let mut add = |from: u32, to: u32| match &mut run {
            Some((_, end)) if end.checked_add(1) == Some(from) => *end = to,
            run => {
                if let Some((from, to)) = run.replace((from, to)) {
                    visit(from, to);
                }
            }
        };
        self.visit_parts(first, last, &mut add);
        if let Some((from, to)) = run {
            visit(from, to);
        }
    }

    /// As [`Messages::visit_runs`], but what is one run may come in several parts.
    fn visit_parts(&self, first: u32, last: u32, mut visit: impl FnMut(u32, u32)) {
        let start = self.blocks.partition_point(|block| block.last < first);
        for block in self.blocks[start..].iter().take_while(|block| block.first <= last) {
            if block.is_dense() {
                visit(block.first.max(first), block.last.min(last));
            } else {
                block.uids().filter(|uid| (first..=last).contains(uid)).for_each(|uid| visit(uid, uid));
            }
        }
        let open = self.open.iter().map(|row| row[UID] as u32);
        open.filter(|uid| (first..=last).contains(uid)).for_each(|uid| visit(uid, uid));
    }

    /// The UIDs from one on, with sequence numbers of their own.
    pub(crate) fn numbering_from(&self, first: u32) -> Numbering {
        let mut numbering = Numbering::default();
        self.visit_parts(first, u32::MAX, |first, last| numbering.push(first, last));
        numbering.shrink_to_fit();
        numbering
    }

    /// The UIDs with the sizes of their messages from a position on.
    pub fn uids_and_sizes_from(&self, at: usize) -> impl Iterator<Item = (u32, u64)> + '_ {
        let packed = |block: &Block, number| (block.uid(number), block.size(number));
        self.each_from(at, packed, |row| (row[UID] as u32, row[SIZE]))
    }

    fn last_uid(&self) -> Option<u32> {
        let packed = self.blocks.last().map(|block| block.last);
        self.open.last().map(|row| row[UID] as u32).or(packed)
    }

    /// Where a UID stands, or would.
    pub fn position(&self, uid: Uid) -> Result<usize, usize> {
        let open_start = self.open_start();
        if self.open.first().is_some_and(|row| row[UID] <= uid.0.into()) {
            let found = self.open.binary_search_by_key(&u64::from(uid.0), |row| row[UID]);
            return found.map(|at| open_start + at).map_err(|at| open_start + at);
        }
        let after = self.blocks.partition_point(|block| block.first <= uid.0);
        let Some(number) = after.checked_sub(1) else { return Err(0) };
        let (block, start) = (&self.blocks[number], self.starts[number] as usize);
        // Dense mailboxes are the rule: the first guess is mostly right.
        let guess = (uid.0 - block.first) as usize;
        if guess < block.rows() && block.uid(guess) == uid.0 {
            return Ok(start + guess);
        }
        let (mut low, mut high) = (0, block.rows());
        while low < high {
            let middle = usize::midpoint(low, high);
            match block.uid(middle).cmp(&uid.0) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Ok(start + middle),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Err(start + low)
    }

    /// Puts a message to its place; one of the same UID goes.
    pub fn put(&mut self, message: &Message) {
        let row = row_of(message);
        if self.last_uid().is_none_or(|last| last < message.uid.0) {
            self.push(row);
            return;
        }
        let found = self.position(message.uid);
        let (at, removed) = (found.unwrap_or_else(|at| at), usize::from(found.is_ok()));
        if let Some(number) = at.checked_sub(self.open_start()) {
            self.open.splice(number..number + removed, [row]);
            return;
        }
        let (block, number) = self.place(at);
        let mut rows = self.blocks[block].unpack();
        rows.splice(number..number + removed, [row]);
        // One too many makes two halves.
        let parts = rows.chunks(if rows.len() > BLOCK_ROWS { rows.len().div_ceil(2) } else { BLOCK_ROWS });
        self.blocks.splice(block..=block, parts.map(Block::pack));
        self.count_from(block);
    }

    /// Appends a message with a UID above all others.
    fn push(&mut self, row: Row) {
        if self.open.is_empty()
            && let Some(last) = self.blocks.pop_if(|last| last.rows() < BLOCK_ROWS)
        {
            self.starts.pop();
            self.open = last.unpack();
        }
        self.open.push(row);
        if self.open.len() >= BLOCK_ROWS {
            self.starts.push(self.open_start() as u32);
            self.blocks.push(Block::pack(&self.open[..BLOCK_ROWS]));
            self.open.drain(..BLOCK_ROWS);
        }
    }

    /// Sets the mod-sequence of those of the UIDs that there are.
    pub fn set_modseq(&mut self, uids: &RoaringBitmap, modseq: ModSeq) {
        let mut ascending = uids.iter();
        let Some(mut range) = ascending.next_range() else { return };
        let start = self.blocks.partition_point(|block| block.last < *range.start());
        for block in &mut self.blocks[start..] {
            while *range.end() < block.first {
                let Some(next) = ascending.next_range() else { return };
                range = next;
            }
            if range.contains(&block.first) && range.contains(&block.last) {
                block.set_modseq(modseq);
            } else if *range.start() <= block.last {
                let (mut modseqs, mut changes) = ([0; BLOCK_ROWS], false);
                for ((uid, old), new) in block.uids().zip(block.column(MODSEQ)).zip(&mut modseqs) {
                    while *range.end() < uid
                        && let Some(next) = ascending.next_range()
                    {
                        range = next;
                    }
                    let is_meant = range.contains(&uid);
                    *new = if is_meant { modseq.0 } else { old };
                    changes |= is_meant;
                }
                if changes {
                    block.set_modseqs(&modseqs[..block.rows()]);
                }
            }
        }
        let open = self.open.iter_mut().filter(|row| uids.contains(row[UID] as u32));
        open.for_each(|row| row[MODSEQ] = modseq.0);
    }

    /// Lets messages that have been moved lie where they are now. `moved` ascends by UID; where a message lies elsewhere than it
    /// says, it stays as it is.
    pub fn relocate(&mut self, moved: &[Moved]) {
        let open_uid = self.open.first().map_or(u32::MAX, |row| row[UID] as u32);
        let (packed, open) = moved.split_at(moved.partition_point(|moved| moved.uid.0 < open_uid));
        let block_of = |moved: &Moved, blocks: &[Block]| blocks.partition_point(|block| block.first <= moved.uid.0);
        for of_block in
            packed.chunk_by(|a, b| block_of(a, &self.blocks) == block_of(b, &self.blocks)).collect::<Vec<_>>()
        {
            let Some(number) = block_of(&of_block[0], &self.blocks).checked_sub(1) else { continue };
            let mut rows = self.blocks[number].unpack();
            relocate_rows(&mut rows, of_block);
            self.blocks[number] = Block::pack(&rows);
        }
        relocate_rows(&mut self.open, open);
    }

    /// Takes UIDs away.
    pub fn remove(&mut self, gone: &RoaringBitmap) {
        let (Some(first), Some(last)) = (gone.min(), gone.max()) else { return };
        let from = self.blocks.partition_point(|block| block.last < first);
        let to = self.blocks.partition_point(|block| block.first <= last);
        let mut ascending = gone.iter();
        let mut next = ascending.next();
        let mut left = from;
        for at in from..to {
            let block = &mut self.blocks[at];
            if next.is_none_or(|next| next > block.last) || block.remove(&mut next, &mut ascending) {
                self.blocks.swap(left, at);
                left += 1;
            }
        }
        self.blocks.drain(left..to.max(left));
        self.open.retain(|row| !gone.contains(row[UID] as u32));
        self.count_from(from);
    }

    /// Finds the starts of the blocks anew, from one on.
    fn count_from(&mut self, block: usize) {
        self.starts.truncate(block);
        let mut start = self.starts.last().map_or(0, |start| start + self.blocks[block - 1].rows);
        for block in &self.blocks[block..] {
            self.starts.push(start);
            start += block.rows;
        }
    }

    /// Octets of messages, of those that there are.
    pub fn size_of(&self, uids: &RoaringBitmap) -> u64 {
        let Some(first) = uids.min() else { return 0 };
        let mut ascending = uids.iter();
        let mut next = ascending.next();
        let start = self.blocks.partition_point(|block| block.last < first);
        let packed = self.blocks[start..].iter().flat_map(|block| block.uids().zip(block.column(SIZE)));
        let open = self.open.iter().map(|row| (row[UID] as u32, row[SIZE]));
        let mut size = 0_u64;
        for (uid, octets) in packed.chain(open) {
            while next.is_some_and(|next| next < uid) {
                next = ascending.next();
            }
            match next {
                None => break,
                Some(next) if next == uid => size = octets.saturating_add(size),
                Some(_) => {}
            }
        }
        size
    }

    /// Them as a page has them.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.memory_bytes());
        let mut rows: Vec<Row> = Vec::new();
        let put_all = |rows: &mut Vec<Row>, out: &mut Vec<u8>| {
            rows.chunks(BLOCK_ROWS).for_each(|rows| Block::pack(rows).put(out));
            rows.clear();
        };
        for block in &self.blocks {
            if block.rows() >= BLOCK_ROWS_KEPT {
                put_all(&mut rows, &mut out);
                block.put(&mut out);
                continue;
            }
            rows.extend(block.unpack());
            if rows.len() >= BLOCK_ROWS {
                Block::pack(&rows[..BLOCK_ROWS]).put(&mut out);
                rows.drain(..BLOCK_ROWS);
            }
        }
        rows.extend_from_slice(&self.open);
        put_all(&mut rows, &mut out);
        out
    }

    /// Those that a page has.
    ///
    /// # Errors
    /// If these are not the bytes of messages whose UIDs ascend.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut messages = Self::default();
        let mut input = Input(bytes);
        let mut last = None;
        while !input.0.is_empty() {
            let block = Block::take(&mut input, last)?;
            last = Some(block.last);
            messages.blocks.push(block);
        }
        messages.blocks.shrink_to_fit();
        messages.count_from(0);
        Ok(messages)
    }

    /// Roughly the memory that they take.
    pub fn memory_bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(|block| block.bytes.len()).sum();
        blocks
            + self.blocks.capacity() * size_of::<Block>()
            + self.starts.capacity() * size_of::<u32>()
            + self.open.capacity() * size_of::<Row>()
    }
}

/// Of messages whose UIDs ascend, all packed.
impl FromIterator<Message> for Messages {
    fn from_iter<I: IntoIterator<Item = Message>>(messages: I) -> Self {
        let mut built = Self::default();
        let mut rows = Vec::with_capacity(BLOCK_ROWS);
        for message in messages {
            rows.push(row_of(&message));
            if rows.len() == BLOCK_ROWS {
                built.blocks.push(Block::pack(&rows));
                rows.clear();
            }
        }
        if !rows.is_empty() {
            built.blocks.push(Block::pack(&rows));
        }
        built.blocks.shrink_to_fit();
        built.count_from(0);
        built
    }
}

impl PartialEq for Messages {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn message(uid: u32, seed: u64) -> Message {
        let mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // Some have every field at its end, so that columns of all widths come about.
        let field = |number: u32| match mixed.rotate_left(number) % 5 {
            0 => 0,
            1 => u64::MAX,
            _ => mixed.rotate_left(number * 5) >> (mixed.rotate_left(number + 9) % 64),
        };
        Message {
            uid: Uid(uid),
            prefix_of: field(1) as u16,
            zone_minutes: field(2) as i16,
            modseq: ModSeq(field(3)),
            id: MessageId { origin: ShardId(field(4) as u32), lsn: Lsn(field(5)) },
            location: Location {
                segment: SegmentId(field(6) as u32),
                offset_units: field(7) as u32,
                len: field(8) as u32,
                ordinal: field(9) as u32,
            },
            head_bytes: field(10) as u32,
            size: field(11),
            internal_date: field(12) as i64,
            save_date: field(13) as i64,
        }
    }

    fn assert_same(messages: &Messages, expected: &BTreeMap<u32, Message>) {
        assert!(messages.iter().eq(expected.values().copied()));
        assert!(messages.uids().eq(expected.keys().copied()));
        let modseqs = expected.values().map(|message| (message.uid.0, message.modseq));
        assert!(messages.uids_and_modseqs_from(0).eq(modseqs));
        let mut runs = Vec::new();
        messages.visit_runs(0, u32::MAX, |first, last| runs.push((first, last)));
        assert!(runs.windows(2).all(|runs| runs[0].1 + 1 < runs[1].0), "each run is as long as can be");
        assert!(runs.iter().flat_map(|&(first, last)| first..=last).eq(expected.keys().copied()));
        let sizes = expected.values().map(|message| (message.uid.0, message.size));
        assert!(messages.uids_and_sizes_from(0).eq(sizes));
        for (at, (&uid, message)) in expected.iter().enumerate() {
            assert_eq!(messages.get(at), *message);
            assert_eq!(messages.position(Uid(uid)), Ok(at));
            if !expected.contains_key(&(uid - 1)) {
                assert_eq!(messages.position(Uid(uid - 1)), Err(at));
            }
        }
        for at in [0, 1, 127, 128, 129, expected.len() / 2, expected.len(), expected.len() + 1] {
            assert!(messages.iter_from(at).eq(expected.values().copied().skip(at)), "from {at}");
            assert!(messages.uids_from(at).eq(expected.keys().copied().skip(at)), "from {at}");
            let Some((first, anchor)) = expected.iter().nth(at) else { continue };
            for last in [first.saturating_sub(1), *first, first + 200, u32::MAX] {
                let mut between = Vec::new();
                messages.visit_runs(*first, last, |from, to| between.extend(from..=to));
                let wanted = expected.keys().copied().filter(|uid| (*first..=last).contains(uid));
                assert!(between.into_iter().eq(wanted), "from {first} to {last}");
            }
            for (since, but) in [(ModSeq(0), None), (anchor.modseq, None), (ModSeq(1), Some(anchor.modseq))] {
                let modified = expected.values().take(at).map(|message| (message.uid.0, message.modseq));
                let modified = modified.filter(|&(_, modseq)| modseq > since && Some(modseq) != but);
                assert!(messages.modified(at, since, but).eq(modified), "before {at} since {since:?} but {but:?}");
            }
        }
        assert_eq!(*messages, expected.values().copied().collect());
    }

    #[test]
    fn whatever_happens_they_are_those_of_a_map() {
        for seed in 0..20_u64 {
            println!("seed {seed}");
            let mut random = seed;
            let mut below = |limit: u64| {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (random >> 33) % limit
            };
            let mut expected = BTreeMap::new();
            let mut messages = Messages::default();
            for step in 0..40 {
                match below(7) {
                    0 | 1 => {
                        let next = messages.uids().last().map_or(1, |last| last + 1);
                        for uid in next..next + below(300) as u32 {
                            let new = message(uid, below(1 << 30));
                            messages.put(&new);
                            expected.insert(uid, new);
                        }
                    }
                    2 => {
                        for _ in 0..below(200) {
                            let new = message(below(3000) as u32 + 1, below(1 << 30));
                            messages.put(&new);
                            expected.insert(new.uid.0, new);
                        }
                    }
                    3 => {
                        let (from, every) = (below(2000) as u32, below(9) as usize + 1);
                        let gone: RoaringBitmap = (from..from + below(800) as u32).step_by(every).collect();
                        messages.remove(&gone);
                        expected.retain(|&uid, _| !gone.contains(uid));
                    }
                    4 => {
                        let (first, every) = (below(2000) as u32, below(5) as usize + 1);
                        let uids: RoaringBitmap = (first..first + below(500) as u32).step_by(every).collect();
                        // Of all lengths, so that the column takes all widths.
                        let modseq = ModSeq(below(1 << 31) << below(32) >> below(60));
                        messages.set_modseq(&uids, modseq);
                        let meant = expected.values_mut().filter(|message| uids.contains(message.uid.0));
                        meant.for_each(|message| message.modseq = modseq);
                    }
                    5 => messages = Messages::decode(&messages.encode()).unwrap(),
                    _ => messages = messages.iter().collect(),
                }
                assert_eq!(messages.len(), expected.len(), "seed {seed}, step {step}");
                assert_same(&messages, &expected);
                let first = below(3000) as u32;
                let numbering = messages.numbering_from(first);
                let known = expected.keys().copied().filter(|&uid| uid >= first);
                assert!(numbering.runs().flat_map(|(from, to)| from..=to).eq(known), "seed {seed}, step {step}");
                let some: RoaringBitmap = (first..3000).step_by(below(9) as usize + 1).collect();
                let sizes =
                    expected.values().filter(|message| some.contains(message.uid.0)).map(|message| message.size);
                assert_eq!(messages.size_of(&some), sizes.fold(0, u64::saturating_add), "seed {seed}, step {step}");
            }
        }
    }

    #[test]
    fn pages_that_are_no_messages_are_refused() {
        let messages: Messages = (1..=300).map(|uid| message(uid * 3, uid.into())).collect();
        let bytes = messages.encode();
        assert!(Messages::decode(&bytes) == Ok(messages));
        for len in 1..bytes.len() {
            // Where a block ends the rest is messages.
            if let Ok(rest) = Messages::decode(&bytes[..len]) {
                assert_eq!(rest.len() % BLOCK_ROWS, 0, "{len} bytes");
            }
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 9, 0x7f, 0xff] {
                let mut forged = bytes.clone();
                forged[at] = value;
                if let Ok(messages) = Messages::decode(&forged) {
                    assert!(messages.uids().is_sorted_by(|a, b| a < b), "byte {at}");
                    assert_eq!(messages.iter().count(), messages.len());
                }
            }
        }
    }

    #[test]
    fn a_usual_message_takes_little() {
        let usual = |uid: u32| Message {
            uid: Uid(uid),
            zone_minutes: 60,
            modseq: ModSeq(uid.into()),
            id: MessageId { origin: ShardId(0), lsn: Lsn((1 << 40) + u64::from(uid) * 10_000) },
            location: Location {
                segment: SegmentId(uid / 100),
                offset_units: uid.wrapping_mul(2_654_435_761) >> 7,
                len: 2000 + uid % 4000,
                ordinal: uid.wrapping_mul(2_654_435_761) >> 16,
            },
            head_bytes: 700 + uid % 300,
            size: 3000 + u64::from(uid % 30_000),
            internal_date: 1_800_000_000 + i64::from(uid) * 3000,
            save_date: 1_800_000_000 + i64::from(uid) * 3000,
            ..Message::default()
        };
        let messages: Messages = (1..=1000).map(usual).collect();
        let bytes = messages.memory_bytes() / 1000;
        assert!(bytes <= 28, "{bytes} bytes each");
    }
}
