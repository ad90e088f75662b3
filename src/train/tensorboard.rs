//! Event files that TensorBoard reads: scalars only.
//!
//! A file is a list of TFRecords: length (u64), its checksum, content, its checksum (both CRC-32C, masked), little-endian.
//! The content is a protobuf message `Event`, of which these fields are written:
//!
//! ```text
//! Event   { double wall_time = 1; int64 step = 2; string file_version = 3; Summary summary = 5; SessionLog session_log = 7; }
//! Summary { repeated Value value = 1; }    Value { string tag = 1; float simple_value = 2; }
//! SessionLog { SessionStatus status = 1; } with START = 1
//! ```
//!
//! The two crates for this are not kept up, and the format is smaller than their dependencies.

use crate::durable::WriteError;
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// An event file, open for writing. What was written is in the file when a call returns.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// A new file in `folder`. After a `resumed` step, TensorBoard forgets later steps of earlier files of the folder:
    /// they were lost with the run that was cut off.
    pub fn create(folder: &Path, resumed: Option<u64>) -> Result<EventFile, WriteError> {
        let now = now();
        // TensorBoard goes by the part `tfevents` and reads files in the order of their names.
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.{}.c2c",
            now.as_secs(),
            now.subsec_nanos(),
            std::process::id()
        );
        let path = folder.join(name);
        let file = File::create_new(&path).map_err(WriteError::at(&path))?;
        let mut events = EventFile { file, path };
        events.append(None, |event| event.text(3, b"brain.Event:2"))?;
        if let Some(step) = resumed {
            let mut start = Message::default();
            start.varint(1, 1);
            events.append(Some(step + 1), |event| event.text(7, &start.bytes))?;
        }
        Ok(events)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The values of one step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<(), WriteError> {
        let mut summary = Message::default();
        for &(tag, number) in values {
            let mut value = Message::default();
            value.text(1, tag.as_bytes());
            value.float(2, number as f32);
            summary.text(1, &value.bytes);
        }
        self.append(Some(step), |event| event.text(5, &summary.bytes))
    }

    fn append(&mut self, step: Option<u64>, fill: impl FnOnce(&mut Message)) -> Result<(), WriteError> {
        let mut event = Message::default();
        event.double(1, now().as_secs_f64());
        if let Some(step) = step {
            event.varint(2, step);
        }
        fill(&mut event);
        let length = (event.bytes.len() as u64).to_le_bytes();
        let record = [
            &length[..],
            &masked_checksum(&length).to_le_bytes(),
            &event.bytes,
            &masked_checksum(&event.bytes).to_le_bytes(),
        ]
        .concat();
        self.file.write_all(&record).map_err(WriteError::at(&self.path))
    }
}

fn now() -> Duration {
    // A clock before 1970 shows as 1970.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A checksum of data that may hold checksums itself is rotated and shifted, so that it isn't taken for one of them.
fn masked_checksum(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A protobuf message in the making.
#[derive(Default)]
struct Message {
    bytes: Vec<u8>,
}

impl Message {
    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.bytes.push(value as u8);
    }

    fn key(&mut self, field: u64, wire_type: u64) {
        self.raw_varint(field << 3 | wire_type);
    }

    fn varint(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.bytes.extend(value.to_le_bytes());
    }

    /// A text, bytes or a message.
    fn text(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.bytes.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.bytes.extend(value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of CRC-32C.
    #[test]
    fn checksum_is_masked() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        // Rotated right by 15 bits, 0xa282_ead8 added.
        assert_eq!(masked_checksum(b"123456789"), 0xc78a_b0e5);
    }

    #[test]
    fn varints() {
        for (value, bytes) in [(0, vec![0]), (127, vec![127]), (128, vec![128, 1]), (300, vec![0xac, 2])] {
            let mut message = Message::default();
            message.raw_varint(value);
            assert_eq!(message.bytes, bytes);
        }
        let mut message = Message::default();
        message.raw_varint(u64::MAX);
        assert_eq!(message.bytes.len(), 10);
    }
}
