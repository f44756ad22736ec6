-- For each drawn frame, writes one line to the log and draws the frame number as a barcode above and below the
-- recorded picture, so that the recorder can verify which line belongs to which picture. A line also contains the
-- nodes around the player if they have changed since the last line that had them.

local BITS, SQUARE = 14, 16 -- bits of the barcode; side in pixels of one bit, and height of the strips
local WHITE = "default_cloud.png^[colorize:#ffffff:255"
local BLACK = "default_cloud.png^[colorize:#000000:255"

local REACH = 3 -- nodes from the player's feet to the faces of the logged box
local REREAD = 8 -- frames until the box of a standing player is read again: terrain loads and water flows

local frame = 0
local squares = {} -- [bit] = {above = hud id, below = hud id, shown = 0 or 1}

local function add_square(player, bit, edge)
	return player:hud_add({
		hud_elem_type = "image",
		position = {x = 0, y = edge},
		offset = {x = bit * SQUARE + SQUARE / 2, y = edge == 0 and SQUARE / 2 or -SQUARE / 2},
		alignment = {x = 0, y = 0},
		scale = {x = 1, y = 1},
		text = BLACK,
		z_index = 1000,
	})
end

local function draw_barcode(player)
	local rest = frame
	for bit = 0, BITS - 1 do
		local value = rest % 2
		rest = (rest - value) / 2
		local square = squares[bit]
		if not square then
			square = {above = add_square(player, bit, 0), below = add_square(player, bit, 1)}
			squares[bit] = square
		end
		if square.shown ~= value then
			square.shown = value
			player:hud_change(square.above, "text", value == 1 and WHITE or BLACK)
			player:hud_change(square.below, "text", value == 1 and BLACK or WHITE) -- inverted
		end
	end
end

-- [node name] = its code in dataset/surroundings.py: 0 unknown, 1 free, 2 liquid, 3 solid, 4 low
local codes = {}

local function is_full_cube(def)
	local box = def.collision_box
	if not box or box.type ~= "fixed" then box = def.drawtype == "nodebox" and def.node_box or nil end
	if not box or box.type ~= "fixed" then return true end
	local parts = box.fixed
	if type(parts[1]) ~= "table" then parts = {parts} end
	for _, part in ipairs(parts) do
		local largest = 0
		for i = 1, 6 do largest = math.max(largest, math.abs(part[i])) end
		local half = (largest > 1 and 10 or 1) * 0.499 -- client mods get tenths of a node
		local full = true
		for i = 1, 3 do full = full and part[i] <= -half and part[i + 3] >= half end
		if full then return true end
	end
	return false
end

local function code_of(name)
	local def = minetest.get_node_def(name)
	if not def or name == "ignore" then return "0" end
	if def.drawtype == "liquid" or def.drawtype == "flowingliquid" then return "2" end
	if not def.walkable then return "1" end
	return is_full_cube(def) and "3" or "4"
end

local box = "" -- codes of all nodes: x descending, then y and z ascending; the recorder mirrors x
local box_at = {} -- the node of the player's feet, the centre of the box
local box_read = 0 -- frame in which the box was last read

-- Returns the box and its centre if they have changed since the last call that returned them.
local function nodes_around(pos)
	-- Add a centimetre, since feet on a node are exactly on its border.
	local at = {x = math.floor(pos.x + 0.5), y = math.floor(pos.y + 0.51), z = math.floor(pos.z + 0.5)}
	local moved = at.x ~= box_at.x or at.y ~= box_at.y or at.z ~= box_at.z
	if not moved and frame - box_read < REREAD then return end
	box_read = frame
	local digits, n, where = {}, 0, {}
	for x = at.x + REACH, at.x - REACH, -1 do
		for y = at.y - REACH, at.y + REACH do
			for z = at.z - REACH, at.z + REACH do
				where.x, where.y, where.z = x, y, z
				local node = minetest.get_node_or_nil(where)
				local code = "0"
				if node then
					code = codes[node.name]
					if not code then
						code = code_of(node.name)
						codes[node.name] = code
					end
				end
				n = n + 1
				digits[n] = code
			end
		end
	end
	local now = table.concat(digits)
	if not moved and now == box then return end
	box, box_at = now, at
	return box, {at.x, at.y, at.z}
end

minetest.register_on_receiving_chat_message(function() return true end) -- no text in the picture

minetest.register_globalstep(function(dtime)
	local player, camera = minetest.localplayer, minetest.camera
	if not player or not camera then return end
	frame = frame + 1
	draw_barcode(player)
	local keys = player:get_control()
	local pos = player:get_pos()
	local eye = {x = pos.x, y = pos.y + 1.47, z = pos.z}
	local function name_at(at)
		local node = minetest.get_node_or_nil(at)
		return node and node.name or ""
	end
	-- The camera's position is that of the previous frame: the game moves the camera after this callback.
	local view = camera:get_pos()
	local nodes, middle = nodes_around(pos)
	minetest.log("action", "OCHRE frame " .. minetest.write_json({
		n = frame,
		dt = dtime,
		yaw = math.deg(camera:get_look_horizontal() or 0),
		pitch = math.deg(camera:get_look_vertical() or 0),
		pos = {pos.x, pos.y, pos.z},
		view = {view.x, view.y, view.z},
		keys = {
			forward = keys.up, back = keys.down, left = keys.left, right = keys.right,
			jump = keys.jump, sneak = keys.sneak,
		},
		node = name_at(eye),
		feet = name_at({x = pos.x, y = pos.y + 0.3, z = pos.z}),
		light = minetest.get_node_light(eye, 0.5) or -1,
		nodes = nodes,
		middle = middle,
	}))
end)
