//! What a program costs the verifier and the kernel.

use std::{collections::BTreeMap, os::fd::AsFd};

use crate::{Datapath, LoadError, sys};

/// One program's bill.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bill {
    /// Name in the object.
    pub name: String,
    /// Instructions that the verifier walked.
    pub verified: u32,
    /// Bytes of stack over the deepest chain of calls, counted as the verifier counts them: the
    /// deepest byte that each function's final instructions touch, rounded up to 16, summed.
    pub stack: u32,
    /// Bytes of instructions after the kernel's rewriting.
    pub xlated: u32,
    /// Bytes of machine code.
    pub jited: u32,
}

impl Datapath {
    /// The bill of every program, by name.
    pub fn bills(&mut self) -> Result<Vec<Bill>, LoadError> {
        let mut bills = Vec::new();
        for status in self.programs()? {
            let program = self.programs.fd(&status.name)?;
            let code = sys::program_code(program.as_fd())
                .map_err(|error| LoadError::Object(format!("{}: {error}", status.name)))?;
            bills.push(Bill {
                verified: status.verified_instructions,
                stack: deepest_chain(&code.instructions),
                xlated: code.instructions.len() as u32,
                jited: code.jited,
                name: status.name,
            });
        }
        Ok(bills)
    }
}

const FRAME_POINTER: u8 = 10;
/// To what the verifier rounds a frame of a program that will be compiled.
const ROUNDING: u32 = 16;

/// One instruction (`struct bpf_insn`).
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    dst: u8,
    src: u8,
    off: i16,
    imm: i32,
}

/// A function of a program: its frame, and the starts of those it calls.
#[derive(Default)]
struct Function {
    depth: u32,
    calls: Vec<usize>,
}

fn deepest_chain(bytes: &[u8]) -> u32 {
    let code: Vec<Instruction> = bytes.as_chunks::<8>().0.iter().map(decode).collect();
    let mut functions: BTreeMap<usize, Function> = BTreeMap::from([(0, Function::default())]);
    functions.extend(code.iter().enumerate().filter_map(callee).map(|start| (start, Function::default())));
    let starts: Vec<usize> = functions.keys().copied().collect();
    for (i, start) in starts.iter().enumerate() {
        let end = starts.get(i + 1).copied().unwrap_or(code.len());
        let body = code.get(*start..end).unwrap_or_default();
        let calls = body.iter().enumerate().map(|(at, it)| (start + at, it)).filter_map(callee).collect();
        functions.insert(*start, Function { depth: frame(body), calls });
    }
    chain(&functions, 0)
}

/// The verifier refuses recursion, so this ends.
fn chain(functions: &BTreeMap<usize, Function>, start: usize) -> u32 {
    let Some(function) = functions.get(&start) else { return 0 };
    let below = function.calls.iter().map(|callee| chain(functions, *callee)).max().unwrap_or(0);
    function.depth.max(1).next_multiple_of(ROUNDING) + below
}

/// The function that an instruction calls. A dump has the distance in `off`, the number in `imm`.
fn callee((at, it): (usize, &Instruction)) -> Option<usize> {
    const CALL: u8 = 0x85;
    const PSEUDO_CALL: u8 = 1;
    (it.code == CALL && it.src == PSEUDO_CALL).then(|| at.checked_add_signed(it.off as isize + 1)).flatten()
}

/// The deepest byte below the frame pointer that is touched, or whose address is taken.
fn frame(body: &[Instruction]) -> u32 {
    const LOAD: u8 = 1;
    const STORE_IMMEDIATE: u8 = 2;
    const STORE: u8 = 3;
    const MOVE_REGISTER: u8 = 0xbf;
    const ADD_IMMEDIATE: u8 = 0x07;
    // Where registers that point into the frame point, relative to the frame pointer.
    let mut points = [None::<i32>; 16];
    if let Some(frame_pointer) = points.get_mut(FRAME_POINTER as usize) {
        *frame_pointer = Some(0);
    }
    let mut lowest = 0;
    for it in body {
        let at = |register: u8| points.get(register as usize).copied().flatten();
        let touched = match it.code & 7 {
            LOAD => at(it.src).map(|at| at + i32::from(it.off)),
            STORE_IMMEDIATE | STORE => at(it.dst).map(|at| at + i32::from(it.off)),
            _ => None,
        };
        let moved = match it.code {
            MOVE_REGISTER => at(it.src),
            ADD_IMMEDIATE => at(it.dst).map(|at| at + it.imm),
            _ => None,
        };
        lowest = lowest.min(touched.unwrap_or(0)).min(moved.unwrap_or(0));
        let writes = !matches!(it.code & 7, STORE_IMMEDIATE | STORE | 5 | 6);
        if writes && let Some(register) = points.get_mut(it.dst as usize) {
            *register = moved;
        }
    }
    lowest.unsigned_abs()
}

fn decode(bytes: &[u8; 8]) -> Instruction {
    let [code, registers, off @ .., a, b, c, d] = *bytes;
    Instruction {
        code,
        dst: registers & 15,
        src: registers >> 4,
        off: i16::from_le_bytes(off),
        imm: i32::from_le_bytes([a, b, c, d]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(code: &[(u8, u8, u8, i16, i32)]) -> Vec<u8> {
        let encode = |&(code, dst, src, off, imm): &(u8, u8, u8, i16, i32)| {
            let ([o0, o1], [i0, i1, i2, i3]) = (off.to_le_bytes(), imm.to_le_bytes());
            [code, dst | src << 4, o0, o1, i0, i1, i2, i3]
        };
        code.iter().flat_map(encode).collect()
    }

    const EXIT: (u8, u8, u8, i16, i32) = (0x95, 0, 0, 0, 0);

    #[test]
    fn a_frame_is_as_deep_as_the_deepest_byte_touched() {
        // r2 = r10; r2 += -40; *(u32 *)(r2 + 4) = r1; *(u64 *)(r10 - 8) = r1
        let code = [(0xbf, 2, 10, 0, 0), (0x07, 2, 0, 0, -40), (0x63, 2, 1, 4, 0), (0x7b, 10, 1, -8, 0), EXIT];
        assert_eq!(deepest_chain(&program(&code)), 48);
    }

    #[test]
    fn a_register_that_is_no_longer_in_the_frame_does_not_count() {
        // r2 = r10; r2 = *(u64 *)(r1 + 0); r2 += -400
        let code = [(0xbf, 2, 10, 0, 0), (0x79, 2, 1, 0, 0), (0x07, 2, 0, 0, -400), EXIT];
        assert_eq!(deepest_chain(&program(&code)), 16);
    }

    #[test]
    fn frames_add_up_along_the_deepest_chain() {
        let code = [
            (0x7b, 10, 1, -16, 0),
            (0x85, 0, 1, 2, 1), // calls the function at 4
            (0x85, 0, 1, 3, 2), // calls the function at 6
            EXIT,
            (0x7b, 10, 1, -100, 0),
            EXIT,
            (0x7b, 10, 1, -200, 0),
            EXIT,
        ];
        assert_eq!(deepest_chain(&program(&code)), 16 + 208);
    }
}
