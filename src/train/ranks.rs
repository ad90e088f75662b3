//! Several processes that train one run together, one device each.
//!
//! Each takes its share of the batches of an update; gradients are added up over all, so the update is the one that a single process would
//! make of the same batches. Processes are told who they are by the variables that `torchrun` sets: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`,
//! `MASTER_PORT`, and `LOCAL_RANK`, the number of the GPU. They meet over TCP at rank 0. GPUs add up over NCCL, CPUs over the same
//! connections.

use super::{Error, TrainConfig};
use crate::backend::{Communicator, DeviceChoice, Queue, Tensor, cuda};
use sha2::{Digest, Sha256};
use std::{
    env,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

/// How long rank 0 waits for the others, and they for it.
const PATIENCE: Duration = Duration::from_secs(300);

const MAGIC: [u8; 8] = *b"c2cranks";

/// This process among those of its run.
pub struct Ranks {
    rank: usize,
    count: usize,
    /// To rank 0, or at rank 0 to ranks 1, 2, ….
    peers: Vec<TcpStream>,
    /// Which GPU of this machine is meant where none is named.
    local: Option<usize>,
    /// Adds up on the devices themselves.
    device: Option<Box<dyn Communicator>>,
}

/// What the environment says.
struct Place {
    rank: usize,
    count: usize,
    address: String,
    local: Option<usize>,
}

impl Place {
    /// `None` without `WORLD_SIZE`, or where it is 1.
    fn read(variable: &dyn Fn(&'static str) -> Option<String>) -> Result<Option<Place>, Error> {
        let bad = |name: &str, problem: &str| Error::Ranks(format!("{name} {problem}"));
        let Some(count) = variable("WORLD_SIZE") else { return Ok(None) };
        let number = |name: &'static str, text: &str| {
            text.parse::<usize>().map_err(|_| bad(name, &format!("is `{text}`: expected a number")))
        };
        let count = number("WORLD_SIZE", &count)?;
        if count <= 1 {
            return Ok(None);
        }
        let needed = |name: &'static str| {
            variable(name).ok_or_else(|| bad(name, "is not set, but WORLD_SIZE is: start with torchrun"))
        };
        let rank = number("RANK", &needed("RANK")?)?;
        if rank >= count {
            return Err(bad("RANK", &format!("is {rank}: expected less than WORLD_SIZE = {count}")));
        }
        let address = format!("{}:{}", needed("MASTER_ADDR")?, needed("MASTER_PORT")?);
        let local = variable("LOCAL_RANK").map(|text| number("LOCAL_RANK", &text)).transpose()?;
        Ok(Some(Place { rank, count, address, local }))
    }
}

impl Ranks {
    /// One process that trains on its own.
    pub fn alone() -> Ranks {
        Ranks { rank: 0, count: 1, peers: Vec::new(), local: None, device: None }
    }

    /// Meets the other processes of the run that the environment names, all with the same configuration (devices, threads and folders
    /// aside) and all after `step` updates; alone if it names none.
    pub fn from_environment(config: &TrainConfig, step: u64) -> Result<Ranks, Error> {
        let Some(place) = Place::read(&|name| env::var(name).ok())? else { return Ok(Ranks::alone()) };
        let accumulate = config.batch.accumulate;
        if !accumulate.is_multiple_of(place.count) {
            return Err(Error::Ranks(format!(
                "they share the batch.accumulate = {accumulate} batches of an update, which is no multiple of WORLD_SIZE = {}",
                place.count
            )));
        }
        Ranks::meet(&place, config, step)
    }

    fn meet(place: &Place, config: &TrainConfig, step: u64) -> Result<Ranks, Error> {
        let Place { rank, count, address, local } = place;
        let (rank, count) = (*rank, *count);
        let failed = |error: io::Error| Error::Ranks(format!("meeting at {address} failed: {error}"));
        let mine = greeting(count, config, step);
        let start = Instant::now();
        let mut peers: Vec<Option<TcpStream>> = (1..count).map(|_| None).collect();
        if rank == 0 {
            let listener = TcpListener::bind(address).map_err(failed)?;
            listener.set_nonblocking(true).map_err(failed)?;
            while peers.iter().any(Option::is_none) {
                let mut peer = match listener.accept() {
                    Ok((peer, _)) => peer,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        if start.elapsed() > PATIENCE {
                            let missing = peers.iter().filter(|peer| peer.is_none()).count();
                            return Err(Error::Ranks(format!("{missing} of {count} processes did not come")));
                        }
                        thread::sleep(Duration::from_millis(20));
                        continue;
                    }
                    Err(error) => return Err(failed(error)),
                };
                peer.set_nonblocking(false).map_err(failed)?;
                peer.set_read_timeout(Some(Duration::from_secs(10))).map_err(failed)?;
                let (mut theirs, mut number) = (vec![0; mine.len()], [0; 4]);
                // Strangers are not answered.
                if peer.read_exact(&mut theirs).and_then(|()| peer.read_exact(&mut number)).is_err()
                    || theirs[..8] != MAGIC
                {
                    continue;
                }
                let number = u32::from_le_bytes(number) as usize;
                let free = number.checked_sub(1).and_then(|i| peers.get_mut(i)).filter(|peer| peer.is_none());
                let welcome = free.filter(|_| theirs == mine);
                peer.write_all(&[u8::from(welcome.is_some())]).map_err(failed)?;
                match welcome {
                    Some(place) => *place = Some(peer),
                    None => return Err(Error::Ranks(format!("rank {number}: {OTHERS}"))),
                }
            }
        } else {
            let mut peer = loop {
                match TcpStream::connect(address) {
                    Ok(peer) => break peer,
                    Err(error) if start.elapsed() > PATIENCE => return Err(failed(error)),
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                }
            };
            let mut answer = [0];
            let hello = [&mine[..], &(rank as u32).to_le_bytes()].concat();
            peer.write_all(&hello).and_then(|()| peer.read_exact(&mut answer)).map_err(failed)?;
            if answer != [1] {
                return Err(Error::Ranks(format!("rank 0: {OTHERS}")));
            }
            peers = vec![Some(peer)];
        }
        let peers: Vec<TcpStream> = peers.into_iter().flatten().collect();
        for peer in &peers {
            peer.set_nodelay(true).and_then(|()| peer.set_read_timeout(None)).map_err(failed)?;
        }
        Ok(Ranks { rank, count, peers, local: *local, device: None })
    }

    /// The device of this process: of several on one machine each takes the GPU of its `LOCAL_RANK`, unless another than the first was
    /// named.
    pub fn device(&self, choice: DeviceChoice) -> DeviceChoice {
        match (choice, self.local) {
            (DeviceChoice::Cuda(0), Some(local)) => DeviceChoice::Cuda(local),
            (DeviceChoice::Auto, Some(local)) if cuda::count().is_ok_and(|count| count > 0) => {
                DeviceChoice::Cuda(local)
            }
            _ => choice,
        }
    }

    /// Lets the devices add up on their own, where they can.
    pub fn join_devices(&mut self, queue: &Queue) -> Result<(), Error> {
        if self.count > 1
            && let Some(training) = queue.backend().training()
        {
            let (rank, count) = (self.rank, self.count);
            let mut failure = None;
            let joined = training.communicator(queue.id(), rank, count, &mut |bytes| {
                failure = self.broadcast(bytes).err();
            });
            if let Some(error) = failure {
                return Err(error);
            }
            self.device = joined?;
        }
        Ok(())
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether this process writes what the run leaves.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    fn lost(&self, peer: usize, error: io::Error) -> Error {
        let other = if self.leads() { peer + 1 } else { 0 };
        Error::Ranks(format!("rank {other} is gone: {error}; go on from the last checkpoint"))
    }

    fn send(&mut self, peer: usize, bytes: &[u8]) -> Result<(), Error> {
        self.peers[peer].write_all(bytes).map_err(|error| self.lost(peer, error))
    }

    fn receive(&mut self, peer: usize, bytes: &mut [u8]) -> Result<(), Error> {
        self.peers[peer].read_exact(bytes).map_err(|error| self.lost(peer, error))
    }

    /// Rank 0's bytes, everywhere.
    pub fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        if self.leads() {
            return (0..self.peers.len()).try_for_each(|peer| self.send(peer, bytes));
        }
        self.receive(0, bytes)
    }

    /// Whether any process says so, the same everywhere.
    pub fn any(&mut self, mine: bool) -> Result<bool, Error> {
        let mut count = [u32::from(mine)];
        self.sum(&mut count)?;
        Ok(count != [0])
    }

    /// This process's share of the batches of an update, with their numbers in it.
    pub fn share<'a, T>(&self, batches: &'a [T]) -> impl Iterator<Item = (usize, &'a T)> {
        let (rank, count) = (self.rank, self.count);
        batches.iter().enumerate().filter(move |(number, _)| number % count == rank)
    }

    /// Sums over all processes, in the order of their ranks.
    pub fn sum<T: bytemuck::Pod + std::ops::AddAssign>(&mut self, values: &mut [T]) -> Result<(), Error> {
        if self.leads() {
            let mut theirs = values.to_vec();
            for peer in 0..self.peers.len() {
                self.receive(peer, bytemuck::cast_slice_mut(&mut theirs))?;
                values.iter_mut().zip(&theirs).for_each(|(sum, value)| *sum += *value);
            }
        } else {
            self.send(0, bytemuck::cast_slice(values))?;
        }
        self.broadcast(bytemuck::cast_slice_mut(values))
    }

    /// The same for an F32 tensor.
    pub fn sum_tensor(&mut self, queue: &Queue, tensor: &Tensor) -> Result<(), Error> {
        match (&self.device, self.count) {
            (_, 1) => Ok(()),
            (Some(device), _) => Ok(device.sum(tensor)?),
            (None, _) => {
                let mut values = queue.download_f32(tensor)?;
                self.sum(&mut values)?;
                queue.upload(&values, tensor);
                Ok(())
            }
        }
    }
}

const OTHERS: &str = "has another configuration, WORLD_SIZE, version or checkpoint, or its RANK is taken: \
     start all processes with the same command";

/// What all processes of a run have in common.
fn greeting(count: usize, config: &TrainConfig, step: u64) -> Vec<u8> {
    let default = TrainConfig::default();
    let common = TrainConfig {
        device: default.device,
        threads: default.threads,
        out: PathBuf::new(),
        cache_sharer: None,
        ..config.clone()
    };
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(count.to_le_bytes());
    hash.update(step.to_le_bytes());
    hash.update(format!("{common:?}"));
    [&MAGIC[..], &hash.finalize()[..]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(rank: usize, count: usize, port: u16) -> Place {
        Place { rank, count, address: format!("127.0.0.1:{port}"), local: None }
    }

    /// A port that was free a moment ago.
    fn port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn sums_and_words_are_the_same_everywhere() {
        let port = port();
        let processes: Vec<_> = (0..3)
            .map(|rank| {
                thread::spawn(move || {
                    let mut ranks = Ranks::meet(&place(rank, 3, port), &TrainConfig::default(), 0).unwrap();
                    let mut values = [rank as f64 + 1.0, -10.0];
                    ranks.sum(&mut values).unwrap();
                    let mut word = if rank == 0 { *b"word" } else { [0; 4] };
                    ranks.broadcast(&mut word).unwrap();
                    let share: Vec<usize> = ranks.share(&[(); 5]).map(|(number, _)| number).collect();
                    assert_eq!(share, (rank..5).step_by(3).collect::<Vec<_>>());
                    (values, word, ranks.any(rank == 1).unwrap(), ranks.any(false).unwrap())
                })
            })
            .collect();
        for process in processes {
            assert_eq!(process.join().unwrap(), ([6.0, -30.0], *b"word", true, false));
        }
    }

    #[test]
    fn another_configuration_is_turned_away_on_both_sides() {
        let port = port();
        let other = TrainConfig { seed: 1, ..TrainConfig::default() };
        let worker =
            thread::spawn(move || Ranks::meet(&place(1, 2, port), &other, 0).err().unwrap().to_string());
        let lead = Ranks::meet(&place(0, 2, port), &TrainConfig::default(), 0).err().unwrap().to_string();
        assert!(lead.contains("rank 1: has another configuration"), "{lead}");
        assert!(worker.join().unwrap().contains("rank 0: has another configuration"));
    }

    #[test]
    fn a_lost_process_is_told() {
        let port = port();
        let worker = thread::spawn(move || {
            Ranks::meet(&place(1, 2, port), &TrainConfig::default(), 0).unwrap();
        });
        let mut lead = Ranks::meet(&place(0, 2, port), &TrainConfig::default(), 0).unwrap();
        worker.join().unwrap();
        let error = lead.sum(&mut [1.0f32]).unwrap_err().to_string();
        assert!(error.contains("rank 1 is gone"), "{error}");
    }

    #[test]
    fn the_environment_is_read_strictly() {
        let read = |pairs: &[(&str, &str)]| {
            Place::read(&|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).into()))
        };
        assert!(read(&[]).unwrap().is_none() && read(&[("WORLD_SIZE", "1")]).unwrap().is_none());
        let all = [("WORLD_SIZE", "2"), ("RANK", "1"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "29500")];
        let place = read(&all).unwrap().unwrap();
        assert_eq!((place.rank, place.count, &place.address[..]), (1, 2, "host:29500"));
        assert_eq!(place.local, None);
        for (pairs, part) in [
            (&[("WORLD_SIZE", "two")][..], "WORLD_SIZE is `two`"),
            (&[("WORLD_SIZE", "2")], "RANK is not set"),
            (&[("WORLD_SIZE", "2"), ("RANK", "2")], "RANK is 2"),
            (&[("WORLD_SIZE", "2"), ("RANK", "0")], "MASTER_ADDR is not set"),
        ] {
            let error = read(pairs).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
