"""The operators of a Core ML function's message, to be found and edited."""

from typing import Any

__all__ = ["Block", "Layer"]


class Block:
    """One function's operators, found by what they make and read. :meth:`save` puts them back into the message."""

    def __init__(self, message: Any) -> None:
        self._message = message
        self.operators = [copy_of(operator) for operator in message.operations]

    def save(self) -> None:
        del self._message.operations[:]
        self._message.operations.extend(self.operators)

    def of_kind(self, kind: str) -> list[Any]:
        return [operator for operator in self.operators if operator.type == kind]

    def maker(self, name: str) -> Any:
        return next(o for o in self.operators if any(output.name == name for output in o.outputs))

    def kind_of(self, name: str) -> str:
        """Empty for inputs."""
        return next((o.type for o in self.operators if any(output.name == name for output in o.outputs)), "")

    def readers(self, name: str) -> list[Any]:
        return [o for o in self.operators if any(b.name == name for a in o.inputs.values() for b in a.arguments)]

    def position(self, operator: Any) -> int:
        return next(index for index, other in enumerate(self.operators) if other is operator)

    @staticmethod
    def input(operator: Any, parameter: str) -> str:
        return str(operator.inputs[parameter].arguments[0].name)

    @staticmethod
    def bind(operator: Any, parameter: str, *names: str) -> None:
        """``operator`` reads ``names`` as ``parameter``."""
        del operator.inputs[parameter].arguments[:]
        for name in names:
            operator.inputs[parameter].arguments.add().name = name

    def read_instead(self, old: str, new: str) -> None:
        """Whoever reads ``old`` reads ``new``."""
        for operator in self.operators:
            for argument in operator.inputs.values():
                for binding in argument.arguments:
                    if binding.name == old:
                        binding.name = new

    def rename(self, old: str, new: str) -> None:
        for output in self.maker(old).outputs:
            if output.name == old:
                output.name = new
        self.read_instead(old, new)

    def parts(self, entry: str) -> dict[str, Any]:
        """The values in weight.bin of a constant: ``data`` and ``scale`` of a quantized one, else ``val``."""
        operator = self.maker(entry)
        if operator.type == "const":
            return {"val": operator.attributes["val"]}
        return {part: operator.inputs[part].arguments[0].value for part in ("data", "scale")}

    def clone(self, name: str, before: Any, suffix: str = "_again") -> Any:
        """A copy of what makes ``name`` (one value), just before ``before``; what it makes has ``suffix``."""
        copy = copy_of(self.maker(name))
        self.operators.insert(self.position(before), copy)
        (output,) = copy.outputs
        output.name = f"{name}{suffix}"
        while len([o for o in self.operators if any(out.name == output.name for out in o.outputs)]) > 1:
            output.name += suffix
        return copy

    def plus_one(self, name: str, before: Any) -> str:
        """An int32 that is ``name`` plus one, made just before ``before``."""
        added = self.clone(self._sum_of_integers(), before, "_plus_one")
        one = self._one(added)
        self.bind(added, "x", name)
        self.bind(added, "y", one)
        shape = self._declared(name)
        added.outputs[0].type.CopyFrom(shape)
        return str(added.outputs[0].name)

    def residuals(self) -> list[Any]:
        """The sums with what a linear made: two a layer."""
        return [o for o in self.of_kind("add") if self.kind_of(self.input(o, "y")) == "linear"]

    def embedding(self) -> Any:
        return next(o for o in self.of_kind("gather") if self.input(o, "indices") == "input_ids")

    def masks(self, layer: int) -> list[Any]:
        """The comparisons in a layer's mask: with what lies ahead, and with what lies behind the window."""
        hidden = self.maker(self._hidden(layer))
        if hidden.type != "logical_or":
            return [hidden]
        return [self.maker(self.input(hidden, side)) for side in ("x", "y")]

    def own_mask(self, layer: int) -> Any:
        """A copy of a layer's mask that this layer alone reads: what joins its two comparisons."""
        masked = Layer(self, layer).masked
        chain = []
        name = self.input(masked, "y")
        while self.kind_of(name) != "logical_or":
            chain.append(name)
            name = self.input(self.maker(name), "x")
        either = self.clone(name, masked)
        source = either.outputs[0].name
        for link in reversed(chain):
            copy = self.clone(link, masked)
            self.bind(copy, "x", source)
            source = copy.outputs[0].name
        self.bind(masked, "y", source)
        return either

    def _hidden(self, layer: int) -> str:
        name = self.input(Layer(self, layer).masked, "y")
        while self.kind_of(name) in ("tile", "expand_dims", "mul", "cast"):
            name = self.input(self.maker(name), "x")
        return name

    def _sum_of_integers(self) -> str:
        return str(next(o for o in self.of_kind("add") if self.input(o, "x") == "position").outputs[0].name)

    def _one(self, before: Any) -> str:
        """A constant 1 as int32 ``[]``, which adds to any shape."""
        axis = self.input(self.embedding(), "axis")
        one = self.clone(axis, before, "_one")
        tensor = one.attributes["val"].immediateValue.tensor
        if tensor.WhichOneof("value") == "bytes":
            tensor.bytes.values = (1).to_bytes(4, "little")
        else:
            tensor.ints.values[:] = [1]
        return str(one.outputs[0].name)

    def _declared(self, name: str) -> Any:
        for operator in self.operators:
            for output in operator.outputs:
                if output.name == name:
                    return output.type
        return self.maker(self._sum_of_integers()).outputs[0].type  # the position, of the sum's own shape


def copy_of(operator: Any) -> Any:
    copy = type(operator)()
    copy.CopyFrom(operator)
    return copy


class Layer:
    """The attention of one layer, found by its softmax."""

    def __init__(self, block: Block, layer: int) -> None:
        self.block = block
        softmax = [o for o in block.of_kind("softmax") if block.kind_of(block.input(o, "x")) == "add"][layer]
        self.masked = block.maker(block.input(softmax, "x"))
        scores = block.input(self.masked, "x")
        self.capped = block.kind_of(scores) == "mul"
        while block.kind_of(scores) != "matmul":
            scores = block.input(block.maker(scores), "x")
        self.product = block.maker(scores)
        (self.mixing,) = block.readers(softmax.outputs[0].name)

    def updates(self) -> list[Any]:
        """The operators that write the layer's keys and values into the states."""
        found = []
        for product in (self.product, self.mixing):
            row = self.block.maker(self.block.input(product, "y"))
            whole = self.block.maker(self.block.input(row, "x"))
            write = self.block.operators[self.block.position(whole) - 1]
            found.append(self.block.maker(self.block.input(write, "data")))
        return found

    def rotated(self) -> list[Any]:
        """The sums that make the rotated queries and keys; none without rotation."""
        query = self.block.input(self.block.maker(self.block.input(self.product, "x")), "x")
        if self.block.kind_of(query) == "mul":  # by the scale
            query = self.block.input(self.block.maker(query), "x")
        found = []
        for name in (query, self.block.input(self.updates()[0], "update")):
            maker = self.block.maker(name)
            if maker.type == "concat":
                maker = self.block.maker(self.block.input(maker, "values"))
            if maker.type == "add":
                found.append(maker)
        return found
