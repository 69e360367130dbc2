//! Programs on an interface by filters of a `clsact` qdisc: every kernel has them, if its modules are
//! there, and attaching waits for nobody.
//!
//! Each direction has one filter, priority 1 and handle 1: making it again replaces the program, and
//! every packet sees the old or the new one. The qdisc and its filters end with the interface.
//!
//! Source: `include/uapi/linux/{netlink,rtnetlink,pkt_sched,pkt_cls}.h`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLMSG_ERROR: u16 = 2;
const HEADER_LENGTH: usize = 16;

const TC_H_CLSACT: u32 = 0xffff_fff1;
const TC_H_INGRESS: u32 = 0xffff_fff2;
const TC_H_EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
/// The program's return value is the verdict.
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
/// Priority 1, every protocol (ETH_P_ALL).
const FILTER_INFO: u32 = (1 << 16) | 3_u16.to_be() as u32;
const FILTER_HANDLE: u32 = 1;

/// Seen from the interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Direction {
    /// What comes in by it.
    Ingress,
    /// What goes out by it.
    Egress,
}

/// Puts a program on an interface of the calling thread's network namespace, or in the place of the
/// one that [`attach`] put there before.
pub(super) fn attach(
    ifindex: u32,
    direction: Direction,
    name: &str,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    match ask(&qdisc(ifindex)) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(explained(error)),
        _ => {}
    }
    ask(&filter(ifindex, direction, name, program.as_raw_fd())).map_err(explained)
}

/// The kernel loads its modules itself where they are installed, and says no more than this where
/// they are not.
fn explained(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::NotFound => io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel has no clsact qdisc or no bpf filters: load the modules sch_ingress and \
             cls_bpf (`modprobe -a sch_ingress cls_bpf`), or boot Linux 6.6 or newer",
        ),
        _ => error,
    }
}

/// Takes away what [`attach`] put there. Ok when it, or the interface, is gone already.
pub(super) fn detach(ifindex: u32, direction: Direction) -> io::Result<()> {
    let parent = parent(direction);
    let mut message = message(
        RTM_DELTFILTER,
        0,
        ifindex,
        FILTER_HANDLE,
        parent,
        FILTER_INFO,
    );
    attribute(&mut message, TCA_KIND, b"bpf\0");
    match ask(&finish(message)) {
        // No filter, no interface, no qdisc.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn parent(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => TC_H_INGRESS,
        Direction::Egress => TC_H_EGRESS,
    }
}

fn qdisc(ifindex: u32) -> Vec<u8> {
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let mut message = message(RTM_NEWQDISC, flags, ifindex, 0xffff_0000, TC_H_CLSACT, 0);
    attribute(&mut message, TCA_KIND, b"clsact\0");
    finish(message)
}

fn filter(ifindex: u32, direction: Direction, name: &str, program: i32) -> Vec<u8> {
    let parent = parent(direction);
    let (kind, flags) = (RTM_NEWTFILTER, NLM_F_CREATE);
    let mut message = message(kind, flags, ifindex, FILTER_HANDLE, parent, FILTER_INFO);
    attribute(&mut message, TCA_KIND, b"bpf\0");
    let mut options = Vec::new();
    attribute(&mut options, TCA_BPF_FD, &program.to_ne_bytes());
    attribute(&mut options, TCA_BPF_NAME, format!("{name}\0").as_bytes());
    attribute(
        &mut options,
        TCA_BPF_FLAGS,
        &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes(),
    );
    attribute(&mut message, TCA_OPTIONS, &options);
    finish(message)
}

/// `struct nlmsghdr` and `struct tcmsg`.
fn message(kind: u16, flags: u16, ifindex: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend([0; 8]); // sequence, port
    message.extend([0; 4]); // family, padding
    for word in [ifindex, handle, parent, info] {
        message.extend(word.to_ne_bytes());
    }
    message
}

fn attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Names and nested attributes of a few dozen bytes.
    let length = (value.len() + 4) as u16;
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn finish(mut message: Vec<u8>) -> Vec<u8> {
    let length = (message.len() as u32).to_ne_bytes();
    message[..4].copy_from_slice(&length);
    message
}

/// Sends a request and reads the kernel's answer, which is there when sending has returned.
fn ask(message: &[u8]) -> io::Result<()> {
    let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC);
    let route = Some(SockProtocol::NetlinkRoute);
    let socket = socket(AddressFamily::Netlink, kind, flags, route)?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(socket.as_raw_fd(), message, &kernel, MsgFlags::empty())?;
    let mut answer = [0; 4096];
    let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    result(&answer[..length])
}

/// `struct nlmsgerr` behind its header: 0 or a negative errno.
fn result(answer: &[u8]) -> io::Result<()> {
    let unclear = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "answer of the kernel not understood",
        )
    };
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok());
    let code = answer.get(HEADER_LENGTH..HEADER_LENGTH + 4);
    let code = code
        .and_then(|bytes| bytes.try_into().ok())
        .map(i32::from_ne_bytes);
    match (kind.map(u16::from_ne_bytes), code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        _ => Err(unclear()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_their_length_and_attributes_are_aligned() {
        for message in [qdisc(7), filter(7, Direction::Egress, "to_pod", 3)] {
            let length = u32::from_ne_bytes(message[..4].try_into().unwrap());
            assert_eq!(length as usize, message.len());
            assert_eq!(message.len() % 4, 0);
            assert_eq!(message[20..24], 7_u32.to_ne_bytes());
        }
    }

    #[test]
    fn an_answer_is_the_errno_that_it_carries() {
        let answer = |kind: u16, code: i32| {
            let mut bytes = vec![0; 4];
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(HEADER_LENGTH, 0);
            bytes.extend(code.to_ne_bytes());
            result(&bytes)
        };
        assert!(answer(NLMSG_ERROR, 0).is_ok());
        let error = answer(NLMSG_ERROR, -libc::EEXIST).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(answer(3, 0).is_err());
        assert!(result(&[0; 5]).is_err());
        assert!(answer(NLMSG_ERROR, i32::MIN).is_err());
    }
}
